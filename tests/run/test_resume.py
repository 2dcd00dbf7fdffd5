"""A run is resumed by its folder alone: its recipe, its data, and more epochs than it began with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.identity import continues
from tests.data.make import write_folder

NAME = "baseline/resnet8/digits"
QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}
ONE = recipe(NAME, epochs=1, batch_size=50, milestones=[1])  # an epoch is two steps


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return newest_checkpoint(folder / "checkpoints")[1]


def same(ours: Path, theirs: Path) -> bool:
    mine, other = state_of(ours), state_of(theirs)
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fastokd.train(ONE, out=tmp_path_factory.mktemp("runs") / "whole", **QUICK).folder


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """A finished run of its own for one test."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "form", [["--resume", "cut"], ["cut", "--resume"], ["--resume", "--out=cut"]]
)
def test_a_run_is_resumed_without_its_recipe(
    form: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fastokd.train(ONE, out="cut", max_steps=1, **QUICK)
    assert run_command(["train", *form, "--quiet"]) == 0
    assert same(tmp_path / "cut", finished)


def test_a_finished_run_says_so_and_what_comes_next(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert run_command(["train", "--resume", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "the run is finished: 1 of 1 epoch; a larger --epochs trains it further\n" in printed
    top1 = json.loads(before)["test"]["mean_top1"]
    assert (
        f"test top-1: {top1:.4f} last (epoch 1), {top1:.4f} best (epoch 1, chosen on val)"
        in printed
    )
    assert printed.endswith(f"  fastokd report {whole}\n  fastokd export {whole} --to onnx\n")
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert run_command(["train", "--resume", str(whole), "--max-steps", "1"]) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert run_command(["train", "--resume", str(whole), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_run_that_has_its_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fastokd.train(ONE, out=tmp_path / "cut", max_steps=1, **QUICK)
    assert run_command(["train", "--resume", str(tmp_path / "cut"), "--max-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "the run has taken 1 step, and --max-steps is 1\n" in printed
    assert f"; next:\n  fastokd train --resume {tmp_path / 'cut'}\n  fastokd report " in printed


def test_more_epochs_continue_the_schedule_that_was_begun(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bits as a run that was begun with them and these milestones."""
    longer = replace(ONE, epochs=2)
    fastokd.train(longer, out=tmp_path / "begun", **QUICK)
    assert run_command(["train", "--resume", str(whole), "--epochs", "2"]) == 0
    said = (
        "2 epochs in place of 1: the schedule stays as it was begun, and the rate of the last epoch"
    )
    assert f"{said} is 0.01\n" in capsys.readouterr().out
    assert same(whole, tmp_path / "begun")
    run = fastokd.Run.load(whole)
    assert run.recipe == longer
    assert [row["epoch"] for row in run.metrics] == [0, 1]
    assert run.is_whole
    assert fastokd.resume(whole, epochs=2, **QUICK).metrics == run.metrics
    with pytest.raises(
        UserError, match=r"epochs is 1, but the run in .* was begun with 2: give more"
    ):
        fastokd.resume(whole, epochs=1)


def test_only_the_same_past_is_continued() -> None:
    ten = recipe("okddip-branch/resnet8/digits", epochs=10)
    facts = {"recipe": ten.to_json(), "epoch": 3, "batch": 1}
    assert continues(replace(ten, epochs=20), facts)
    assert not continues(ten, facts)
    assert not continues(replace(ten, epochs=5), facts)
    assert not continues(ten.with_epochs(20), facts), "its ramp was another"
    assert not continues(replace(ten, epochs=20, seed=1), facts)
    alone = recipe(NAME, epochs=10)
    first = alone.milestones[0]
    for epochs, batch, allowed in ((first, 0, True), (first, 1, False), (first + 1, 0, False)):
        facts = {"recipe": alone.to_json(), "epoch": epochs, "batch": batch}
        assert continues(alone.with_epochs(20), facts) == allowed


def test_a_longer_run_by_its_name_is_told_how(whole: Path) -> None:
    with pytest.raises(UserError, match=r"another recipe.*`fastokd train --resume DIR`"):
        fastokd.train(recipe(NAME, epochs=20, lr=0.2), out=whole, resume=True, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume", "run", "--lr", "0.1"], "--lr is given, but a resumed run keeps its recipe"),
        (["--resume", "run", "--set", "lr=0.1"], "--set is given"),
        (["--resume", "run", "--seeds", "0,1"], "--seeds is given"),
        (["--resume", "run", "--scale-lr"], "--scale-lr is given"),
        (["--resume", "run", "--batch-size", "50"], "--batch-size is given"),
        (["--resume", "run", "--method", "tests.run.own:Own"], "--method"),
        (["--resume", "none"], "there is no run to resume in none: name the folder of a run"),
        (["--resume", "runs/none"], "there is no run to resume in runs/none"),
        (["--resume", "."], "there is no run to resume in .: name the folder of a run"),
        (["--resume"], "--resume needs a run: name its folder"),
        (["--resume", "sweep"], "sweep holds several runs: repeat the command that began them"),
        (
            [],
            "train needs a recipe, such as okddip-branch/resnet8/digits, or --resume and the folder",
        ),
        (["run"], "'run' is no recipe"),
    ],
)
def test_what_can_be_got_wrong(
    arguments: list[str],
    says: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(whole.parent)
    (whole.parent / "sweep").mkdir()
    (whole.parent / "sweep/index.json").write_text("[]")
    assert run_command(["train", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_run_knows_where_its_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pictures")
    small = recipe("baseline/resnet8/imagefolder", epochs=2, batch_size=4)
    fastokd.train(small, out="run", data_root="pictures", max_steps=1, **QUICK)
    run = tmp_path / "run"

    def root() -> str:
        found: str = json.loads((run / "environment.json").read_bytes())["data_root"]
        return found

    assert root() == str(tmp_path / "pictures")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    top1 = fastokd.evaluate(run)["test"]["mean_top1"]
    assert run_command(["export", str(run), "--to", "safetensors"]) == 0
    assert run_command(["train", "--resume", str(run), "--max-steps", "2", "--quiet"]) == 0

    moved = (tmp_path / "pictures").rename(tmp_path / "moved")
    gone = rf"lay in {tmp_path}/pictures, which is gone: give .* with --data-root"
    for use in (
        lambda: fastokd.evaluate(run),
        lambda: fastokd.export(run, "onnx", "new"),
        lambda: fastokd.resume(run, **QUICK),
    ):
        with pytest.raises(UserError, match=gone):
            use()
    assert fastokd.evaluate(run, data_root=moved)["test"]["mean_top1"] <= 1 >= top1
    fastokd.resume(run, data_root="../moved", max_steps=3, **QUICK)
    assert root() == str(moved)
    fastokd.evaluate(run)


def test_the_digits_have_no_folder(whole: Path, tmp_path: Path) -> None:
    fastokd.train(ONE, out=tmp_path / "new", data_root=tmp_path / "nowhere", max_steps=1, **QUICK)
    fastokd.evaluate(tmp_path / "new")
