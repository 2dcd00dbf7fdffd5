"""A disk that is full, fails or is read-only: training goes on where it can, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastokd.checkpoint import newest_checkpoint, remove_leftovers
from fastokd.cli import run_command
from fastokd.distributed.ranks import Ranks
from fastokd.errors import DiskError
from fastokd.export import export
from fastokd.metrics import MEASURED
from fastokd.recipe.names import recipe
from fastokd.report.page import report
from fastokd.run.folder import RunFolder
from fastokd.run.interruption import Keeper, StopRequest
from fastokd.run.options import RunOptions
from fastokd.train import train
from tests.faults.disk import KINDS, Disk, files_up_to
from tests.faults.kill import digest

RECIPE = dataclasses.replace(recipe("okddip-branch@2/resnet8/digits", epochs=3), batch_size=250)
OPTIONS = RunOptions(quiet=True, engine="loop", precision="fp32", device="cpu")


def tree(folder: Path) -> set[str]:
    """Every name below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def state_of(step: int) -> Any:
    """What a session must have to be saved."""
    tensors = {"x": torch.full((3,), float(step)), "y": torch.arange(5)}
    facts = {"step": step, "recipe": {}}
    return SimpleNamespace(
        step=step,
        batch=0,
        best=None if step < 2 else 0.1,
        recipe=SimpleNamespace(score=lambda row: row["mean_top1"]),
        state=lambda: (dict(tensors), dict(facts)),
        learner=SimpleNamespace(ranks=Ranks()),
    )


def row_of(step: int) -> dict[str, Any]:
    return {
        "epoch": step - 1,
        "step": step,
        "val": {**dict.fromkeys(MEASURED, 0.0), "mean_top1": step / 10},
    }


def begun(place: Path, steps: int) -> RunFolder:
    """A folder with so many epochs, each the best so far."""
    folder = RunFolder(place)
    folder.checkpoints.mkdir(parents=True)
    for step in range(1, steps + 1):
        folder.record(state_of(step), row_of(step))
        folder.writer.wait()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_one_record_may_fail(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line, the best checkpoint, its link, what is pruned: the one before is whole, nothing
    piles up, and the next record makes up for it."""
    disk = Disk(tmp_path, monkeypatch)
    three = begun(tmp_path / "three", 3).path
    counted = begun(tmp_path / "counted", 3)
    disk.calls = 0
    counted.record(state_of(4), row_of(4))
    counted.writer.wait()
    calls = disk.calls
    assert calls > 20
    wanted = tree(counted.path)
    for call in range(1, calls + 1):
        shutil.copytree(three, tmp_path / f"{call}")
        folder = RunFolder(tmp_path / f"{call}")
        session = state_of(4)
        capsys.readouterr()
        disk.refuse(kind, call)
        folder.record(session, row_of(4))
        folder.writer.wait()
        refused = disk.heal()
        warned = capsys.readouterr().err
        # What isn't warned of was done: cleaning up may fail in silence.
        if kind == "full" and not refused:
            assert not warned
        if not warned:
            assert (folder.checkpoints / "last-000000004").is_dir()
        path, tensors, facts, faults = newest_checkpoint(folder.checkpoints)
        step = facts["step"]
        assert step in (3, 4)
        assert faults == []
        assert path.name == f"last-{step:09d}"
        assert torch.equal(tensors["x"], torch.full((3,), float(step)))
        assert [row["step"] for row in folder.metrics()][:step] == list(range(1, step + 1))
        best = newest_best(folder)
        assert best in (3, 4)
        assert session.best == pytest.approx(best / 10 if best == 4 else 0.1)
        if kind == "read-only":
            remove_leftovers(folder.checkpoints)  # as a run does that goes on here
            remove_leftovers(folder.path)
        left = [name for name in tree(folder.path) if "/." in f"/{name}"]
        assert left == [], (call, warned)
        folder.record(state_of(5), row_of(5))
        folder.writer.wait()
        assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4, 5]
        assert newest_checkpoint(folder.checkpoints)[2]["step"] == 5
        assert len(tree(folder.path)) <= len(wanted) + 4


def newest_best(folder: RunFolder) -> int:
    (best,) = sorted(folder.checkpoints.glob("best-*"))[-1:]
    return int(json.loads((best / "state.json").read_text())["step"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_a_second_save_of_one_step_may_fail(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint takes the place of one of the same name: there is always one."""
    disk = Disk(tmp_path, monkeypatch)
    folder = begun(tmp_path / "run", 2)
    disk.calls = 0
    folder.save(state_of(2))
    for call in range(1, disk.calls + 1):
        disk.refuse(kind, call)
        try:
            folder.save(state_of(2))
        except DiskError as error:
            assert "can't be written" in str(error)  # noqa: PT017
        disk.heal()
        if kind == "read-only":
            remove_leftovers(folder.checkpoints)  # as a run does that goes on here
            remove_leftovers(folder.path)
        facts, faults = newest_checkpoint(folder.checkpoints)[2:]
        assert (facts["step"], faults) == (2, [])
        folder.save(state_of(2))  # a folder that couldn't be removed is, in the next save
        assert [name for name in tree(folder.path) if "/." in f"/{name}"] == []


def at_save(number: int, act: Callable[[RunFolder], None], patch: pytest.MonkeyPatch) -> None:
    """Acts before save ``number`` of the next training, counted from 1, with all before it written."""
    save, saves = RunFolder.save, [0]

    def saving(folder: RunFolder, session: Any, **how: Any) -> None:
        saves[0] += 1
        if saves[0] == number:
            folder.writer.wait()
            act(folder)
        save(folder, session, **how)

    patch.setattr(RunFolder, "save", saving)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, all_digits: None) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(RECIPE, OPTIONS, out=out)
    return out


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses the second epoch's checkpoint: a warning, and the same end."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        limits = files_up_to(100_000)
        at_save(2, lambda _: limits.__enter__(), patch)

        at_save(3, lambda _: limits.__exit__(None, None, None), patch)
        train(RECIPE, OPTIONS, out=out)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert "File too large" in warned[0]
    assert "training continues until the next save" in warned[0]
    assert digest(out) == digest(whole)
    assert [name for name in tree(out) if "/." in f"/{name}"] == []


def test_a_disk_that_stays_full_stops_the_run_at_its_end(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: the reason and the exit code; resumed with room, the same end."""
    out = tmp_path / "run"
    command = ["train", RECIPE.name, "--out", str(out), "--epochs", "3", "--batch-size", "250"]
    command += ["--quiet", "--engine", "loop", "--precision", "fp32", "--device", "cpu"]
    limits = files_up_to(100_000)
    with monkeypatch.context() as patch:
        at_save(2, lambda _: limits.__enter__(), patch)
        assert run_command(command) == 2
    limits.__exit__(None, None, None)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["warning", "warning", "fastokd"]
    assert "File too large" in told[-1]
    assert newest_checkpoint(out / "checkpoints")[2]["epoch"] == 1
    assert not (out / "student.safetensors").exists()
    assert run_command([*command, "--resume"]) == 0
    assert digest(out) == digest(whole)


def test_a_signal_that_finds_no_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(background: bool) -> None:
        if not background:
            raise DiskError("the run folder x can't be written")

    stop = StopRequest()
    keeper = Keeper(full, stop, 1, None)
    keeper.on_step(1)  # goes on
    stop.received = signal.SIGTERM
    with pytest.raises(DiskError):
        keeper.on_step(1)


def test_calls_of_a_report_may_fail(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that was there is whole; nothing half written is left."""
    disk = Disk(whole, monkeypatch)
    page = report([whole]).read_bytes()
    calls = disk.calls
    assert calls > 8
    for call in (1, calls - 1):
        disk.refuse("full", call)
        try:
            report([whole])
        except DiskError as error:
            assert "can't be written: [Errno 28]" in str(error)  # noqa: PT017
        disk.heal()
        assert (whole / "report.html").read_bytes() == page
        assert [name for name in tree(whole) if "/." in f"/{name}"] == []


def test_a_run_without_room_for_its_report_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(runs: Any) -> None:
        raise DiskError(f"{runs[0]}/report.html can't be written")

    monkeypatch.setattr("fastokd.report.page.report", full)
    run = train(RECIPE, OPTIONS, out=tmp_path / "run", max_steps=1)
    assert "`fastokd report" in capsys.readouterr().err
    assert (run.folder / "student.safetensors").is_file()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    return train(
        recipe("baseline/resnet18/digits", batch_size=8), OPTIONS, out=out, max_steps=1
    ).folder


@pytest.mark.parametrize("to", ["safetensors", "torchvision", "torch-export", "hub"])
def test_an_export_that_does_not_fit_leaves_nothing(to: str, resnet18: Path) -> None:
    before = tree(resnet18)
    with files_up_to(100_000), pytest.raises(DiskError, match=r"can't be written.*too large"):
        export(resnet18, to)
    assert tree(resnet18) - {"export"} == before - {"export"}
