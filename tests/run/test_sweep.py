"""Several runs by one command: parsed and checked settings, a folder for each run, an index."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.settings import parse_seeds, parse_settings, wanted_runs
from fastokd.run.options import RunOptions
from fastokd.run.sweep import run_all
from fastokd.train import train
from tests.report.fake import FakeTrain

DIGITS = "okddip-branch/resnet8/digits"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    stand_in = FakeTrain(lambda recipe, epoch: 0.5 + recipe.lr)
    monkeypatch.setattr(sys.modules["fastokd.train"], "train", stand_in)
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
    r = recipe(DIGITS, seed=3, lr=1, mix="probs", milestones=[5, 9], epochs=12)
    assert (r.seed, r.lr, r.milestones, r.epochs) == (3, 1.0, (5, 9), 12)
    assert r.method_options == {"temperature": 3.0, "mix": "probs"}
    assert recipe("kdcl/resnet8/digits", target="naive").method_options["target"] == "naive"


def test_every_combination_is_wanted() -> None:
    wanted = wanted_runs(DIGITS, {}, {"lr": [0.1, 0.05], "mix": ["logits", "probs"]}, seeds=[0, 1])
    assert len({entry.folder for entry in wanted}) == 8
    assert wanted[0].folder == "okddip-branch-resnet8-digits-lr=0.1-mix=logits-seed0"
    assert {(e.recipe.lr, e.recipe.method_options["mix"], e.recipe.seed) for e in wanted} == {
        (lr, mix, seed) for lr in (0.1, 0.05) for mix in ("logits", "probs") for seed in (0, 1)
    }


@pytest.mark.parametrize(
    ("arguments", "settings", "rates"),
    [
        (["--batch-size", "32"], {"batch_size": [32]}, [0.05]),
        (["--batch-size", "32", "--lr", "0.2"], {"lr": [0.2]}, [0.1]),
        (["--set", "batch_size=32"], {}, [0.05]),
        (["--set", "batch_size=32,128", "--set", "lr=0.2"], {}, [0.1, 0.4]),
        (["--set", "batch_size=32", "--set", "lr=0.2,0.4"], {}, [0.1, 0.2]),
    ],
)
def test_a_rate_is_scaled_however_it_and_the_batch_are_said(
    arguments: list[str],
    settings: dict[str, list[Any]],
    rates: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["train", DIGITS, *arguments, "--scale-lr", "--print-recipe"]) == 0
    printed = capsys.readouterr().out.replace("}\n{", "}\n\n{").split("\n\n")
    assert [json.loads(text)["lr"] for text in printed] == pytest.approx(rates)
    for key, values in settings.items():  # equal settings given twice
        assert run_command(
            ["train", DIGITS, *arguments, "--set", f"{key}={values[0]}", "--print-recipe"]
        ) == 0  # fmt: skip


def test_a_run_s_settings_say_its_scaled_rate() -> None:
    (entry,) = wanted_runs(DIGITS, {}, {"batch_size": [32]}, seeds=[1], scale_lr=True)
    assert entry.settings == {"batch_size": 32, "seed": 1, "lr": pytest.approx(0.05)}
    (entry,) = wanted_runs(f"{DIGITS}@finetune", {"batch_size": 64}, {}, scale_lr=True)
    assert (entry.recipe.lr, entry.recipe.head_lr) == pytest.approx((1e-2, 1e-1))


def test_a_seed_is_a_setting() -> None:
    seeds = [0, 1]
    by_set = wanted_runs(DIGITS, {}, {"seed": seeds})
    assert by_set == wanted_runs(DIGITS, {}, {}, seeds=seeds)
    assert by_set == wanted_runs(DIGITS, {}, {"seed": seeds}, seeds=seeds)
    assert [entry.recipe.seed for entry in by_set] == seeds


def test_an_option_is_a_setting_like_a_field() -> None:
    assert recipe(DIGITS, temperature=2) == recipe(DIGITS, method_options={"temperature": 2})
    with pytest.raises(UserError, match="temperature is both 2 and 4: leave one of them out"):
        recipe(DIGITS, temperature=4, method_options={"temperature": 2})
    with pytest.raises(UserError, match=r"students is 4, but okddip-branch@3/\S+ names 3"):
        recipe("okddip-branch@3/resnet8/digits", students=4)
    with pytest.raises(UserError, match=r"lr=0.2 is no option of a run.*fastokd.recipe"):
        train(recipe(DIGITS), lr=0.2)


def test_runs_are_indexed_and_made_once(fake: FakeTrain, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    wanted = wanted_runs(DIGITS, {"epochs": 2}, {"lr": [0.1, 0.05]}, seeds=[0, 1])
    run_all(out, wanted, RunOptions(), fake)
    index = json.loads((out / "index.json").read_text())
    assert [entry["folder"] for entry in index] == [entry.folder for entry in wanted]
    assert all((out / entry["folder"] / "metrics.jsonl").is_file() for entry in index)
    assert index[2]["settings"] == {"lr": 0.05, "seed": 0}
    assert index[2]["best"] == pytest.approx(0.55)
    assert index[2]["best_on"] == "test"
    more = wanted_runs(DIGITS, {"epochs": 2}, {"lr": [0.1, 0.05, 0.2]}, seeds=[0, 1])
    run_all(out, more, RunOptions(), fake)
    assert len(fake.calls) == 6
    assert len(json.loads((out / "index.json").read_text())) == 6


def test_the_command_trains_goes_on_and_refuses(
    fake: FakeTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["train", DIGITS, "--seeds", "0,1", "--epochs", "2", "--out", str(out)]
    assert run_command(command) == 0
    assert run_command(command) == 0
    command[3] = "0,1,2"
    assert run_command([*command, "--resume"]) == 0  # no new request
    assert [seed for _, seed, _ in fake.calls] == [0, 1, 2]
    printed = capsys.readouterr().out
    scored = (
        "test top-1 of the leader: 0.6000 last (epoch 2), 0.6000 best (epoch 1, chosen on test)"
    )
    for seed in (0, 1, 2):
        assert f"okddip-branch-resnet8-digits-seed{seed}: {scored}\n" in printed
    assert printed.endswith(
        f"the 3 runs are in {out}, listed in its index.json; next:\n  fastokd report {out}\n"
    )
    assert run_command([*command, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
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
        (["--set", "lr=0.1", "--set", "lr=0.2"], "--set gives lr twice, 0.1 and 0.2"),
        (["--set", "lr=fast"], "lr must be a number (got 'fast')"),
        (["--set", "epochs=2.5"], "epochs must be a whole number (got 2.5)"),
        (["--set", "flip=1"], "flip must be true or false (got 1)"),
        (["--set", "students=true"], "students must be a whole number (got True)"),
        (["--set", "warmth=3"], "unknown setting 'warmth'"),
        (["--set", "impl=torch"], "give it as --impl"),
        (["--set", "temperature=0"], "temperature is 0"),
        (["--set", "method=dml"], "can't change method"),
        (["--seeds", "one"], "write whole numbers"),
        (["--seeds", "0,-1"], "write whole numbers"),
        (["--seeds", "0,1", "--seed", "2"], "give one of them"),
        (
            ["--batch-size", "32", "--set", "batch_size=64"],
            "batch_size is 32 by --batch-size and 64",
        ),
        (["--lr", "0.2", "--set", "lr=0.1,0.2"], "lr is 0.2 by --lr and 0.1,0.2 by --set"),
        (["--temperature", "2", "--set", "temperature=3"], "temperature is 2.0 by --temperature"),
        (["--epochs", "2", "--set", "epochs=3"], "leave one of them out"),
        (["--val", "1", "--set", "val=2"], "leave one of them out"),
        (["--seed", "1", "--set", "seed=2"], "leave one of them out"),
        (["--seeds", "0,1", "--set", "seed=2"], "seed is 0,1 by --seeds and 2 by --set"),
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
        run_all(tmp_path, wanted_runs(DIGITS, {}, {}, seeds=[0]), RunOptions(), fake)
