"""Several runs by one command: settings parsed and checked, a folder each, an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastokd import sweep
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.sweep import parse_seeds, parse_settings, plan, resolve, run_all
from fastokd.training.session import RunOptions
from tests.report.fake import FakeTrain

DIGITS = "okddip-branch/resnet8/digits"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    stand_in = FakeTrain(lambda recipe, epoch: 0.5 + recipe.lr)
    monkeypatch.setattr(sweep, "train", stand_in)
    return stand_in


def test_settings_are_json_or_words() -> None:
    assert parse_settings(["lr=0.1,0.05", "mix=logits,probs", "milestones=[1,2],[3,4]"]) == {
        "lr": [0.1, 0.05],
        "mix": ["logits", "probs"],
        "milestones": [[1, 2], [3, 4]],
    }
    assert parse_settings(["detach_targets=true"]) == {"detach_targets": [True]}
    assert parse_seeds("0,1, 2,1") == [0, 1, 2]


def test_settings_of_recipe_and_method_are_applied() -> None:
    r = resolve(DIGITS, {"seed": 3}, {"lr": 1, "mix": "probs", "milestones": [5, 9], "epochs": 12})
    assert (r.seed, r.lr, r.milestones, r.epochs) == (3, 1.0, (5, 9), 12)
    assert r.method_options == {"temperature": 3.0, "mix": "probs"}
    assert (
        resolve("kdcl/resnet8/digits", {}, {"target": "naive"}).method_options["target"] == "naive"
    )


def test_every_combination_is_planned() -> None:
    planned = plan(DIGITS, {}, {"lr": [0.1, 0.05], "mix": ["logits", "probs"]}, [0, 1])
    assert len({entry.folder for entry in planned}) == 8
    assert planned[0].folder == "okddip-branch-resnet8-digits-lr=0.1-mix=logits-seed0"
    assert {(e.recipe.lr, e.recipe.method_options["mix"], e.recipe.seed) for e in planned} == {
        (lr, mix, seed) for lr in (0.1, 0.05) for mix in ("logits", "probs") for seed in (0, 1)
    }


def test_runs_are_indexed_and_made_once(fake: FakeTrain, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    planned = plan(DIGITS, {"epochs": 2}, {"lr": [0.1, 0.05]}, [0, 1])
    run_all(out, planned, RunOptions())
    index = json.loads((out / "index.json").read_text())
    assert [entry["folder"] for entry in index] == [entry.folder for entry in planned]
    assert all((out / entry["folder"] / "metrics.jsonl").is_file() for entry in index)
    assert index[2]["settings"] == {"lr": 0.05, "seed": 0}
    assert index[2]["best"] == pytest.approx(0.55)
    assert index[2]["best_on"] == "test"
    more = plan(DIGITS, {"epochs": 2}, {"lr": [0.1, 0.05, 0.2]}, [0, 1])
    run_all(out, more, RunOptions())
    assert len(fake.calls) == 6
    assert len(json.loads((out / "index.json").read_text())) == 6


def test_the_command_trains_goes_on_and_refuses(
    fake: FakeTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["train", DIGITS, "--seeds", "0,1", "--epochs", "2", "--out", str(out)]
    assert run_command(command) == 0
    assert run_command(command) == 0
    assert run_command([*command, "--seeds", "0,1,2", "--resume"]) == 0  # says nothing new
    assert [seed for _, seed, _ in fake.calls] == [0, 1, 2]
    assert "index.json" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    command[-1] = str(other)
    assert run_command(command) == 2
    assert "holds no index.json" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "lr"], "write KEY=VALUE"),
        (["--set", "=1"], "write KEY=VALUE"),
        (["--set", "lr="], "write KEY=VALUE"),
        (["--set", "lr=0.1", "--set", "lr=0.2"], "names lr twice"),
        (["--set", "lr=fast"], "lr is 'fast': it must be a number"),
        (["--set", "epochs=2.5"], "epochs is 2.5: it must be a whole number"),
        (["--set", "flip=1"], "flip is 1: it must be true or false"),
        (["--set", "students=true"], "students is True: it must be a whole number"),
        (["--set", "warmth=3"], "unknown setting 'warmth'"),
        (["--set", "impl=torch"], "unknown setting 'impl'"),
        (["--set", "temperature=0"], "temperature is 0"),
        (["--set", "method=dml"], "can't change method"),
        (["--seeds", "one"], "write whole numbers"),
        (["--seeds", "0,-1"], "write whole numbers"),
        (["--seeds", "0,1", "--seed", "2"], "give one of them"),
    ],
)
def test_what_can_be_got_wrong(
    arguments: list[str],
    says: str,
    fake: FakeTrain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sweep"
    assert run_command(["train", DIGITS, *arguments, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_broken_index_is_named(fake: FakeTrain, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"index.json can't be read"):
        run_all(tmp_path, plan(DIGITS, {}, {}, [0]), RunOptions())
