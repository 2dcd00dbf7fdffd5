"""`fastokd clean` removes what was asked for and shown, and nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.export import export
from fastokd.overview import clean
from fastokd.overview.clean import Asked, plan, remove
from fastokd.overview.listing import Listed, list_runs, look_at
from fastokd.recipe.names import recipe
from fastokd.report.page import report
from fastokd.result import Run
from fastokd.run.identity import is_done
from fastokd.run.lock import FolderLock
from fastokd.train import train
from tests.test_wrong_input import left_in

EVERYTHING = Asked(checkpoints=True, unfinished=True, failed=True, every=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two epochs."""
    small = recipe("okddip-branch/resnet8/digits", epochs=2, students=2, batch_size=50)
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(small, out=out, engine="loop", precision="fp32", quiet=True).folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str) -> Path:
        place = tmp_path / "runs" / name
        shutil.copytree(trained, place)
        return place

    return make


def unfinished(folder: Path) -> Path:
    (folder / "student.safetensors").unlink()
    return folder


def listed(top: Path) -> list[Listed]:
    return list_runs([top], links=False)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_without_its_checkpoints_a_run_is_whole_but_for_going_on(
    copy: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, other = copy("run"), unfinished(copy("other"))
    (run / "checkpoints/.last-000000009.tmp1").mkdir()
    before, students = look_at(run), (run / "student.safetensors").read_bytes()
    freed = {os.stat(p).st_ino: os.stat(p).st_size for p in run.glob("checkpoints/*/*")}
    assert run_command(["clean", str(tmp_path / "runs"), "--checkpoints", "--yes"]) == 0
    out = capsys.readouterr().out
    assert str(run) in out
    assert str(other) not in out
    assert "removed the checkpoints of 1 run" in out
    assert checkpoints(run) == []
    assert checkpoints(other) != []
    after = look_at(run)
    assert before is not None
    assert after is not None
    assert before.bytes - after.bytes == sum(freed.values())
    assert (after.state, after.epoch, after.top1) == ("finished", 2, before.top1)
    assert (run / "student.safetensors").read_bytes() == students
    assert is_done(run, Run.load(run).recipe, None), "a sweep doesn't train it again"
    assert "2 of 2 epochs" in repr(Run.load(run))
    assert report([run]).stat().st_size > 0
    assert "no checkpoint of its step" in " ".join(export(run, "safetensors").lines)
    capsys.readouterr()
    for more in ([], ["--epochs", "3"]):
        assert run_command(["train", "--resume", str(run), *more]) == 2
        assert "as `fastokd clean --checkpoints` leaves a run" in capsys.readouterr().err
    assert run_command(["evaluate", str(run)]) == 2
    assert "only the student.safetensors of the run is left" in capsys.readouterr().err
    assert run_command(["clean", str(tmp_path / "runs"), "--checkpoints", "--yes"]) == 0
    assert capsys.readouterr().out == "there is nothing to remove\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_goes_without_a_yes(
    copy: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run, other = copy("run"), unfinished(copy("other"))
    before, top = left_in(tmp_path), str(tmp_path / "runs")
    assert run_command(["clean", top]) == 2
    assert "clean removes only what is asked for" in capsys.readouterr().err
    assert run_command(["clean", top, "--all", "--dry-run"]) == 0
    assert "would remove 2 runs, " in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run_command(["clean", top, "--all"]) == 2
    assert "no terminal to ask on: add --yes" in capsys.readouterr().err
    for answer in ("\n", "", "no\n", "yess\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run_command(["clean", top, "--all"]) == 0
        assert capsys.readouterr().out.endswith("[y/N] nothing was removed\n")
    assert left_in(tmp_path) == before
    monkeypatch.setattr("sys.stdin", Terminal("Y\n"))
    assert run_command(["clean", top, "--unfinished", "--checkpoints"]) == 0
    said = capsys.readouterr().out
    assert "remove 1 run and the checkpoints of 1 run, " in said
    assert not other.exists()
    assert checkpoints(run) == []


def test_only_what_is_old_of_a_recipe(copy: Callable[..., Path], tmp_path: Path) -> None:
    old, new = copy("old"), copy("new")
    for path in old.rglob("*"):
        os.utime(path, (1e9, 1e9))
    top = str(tmp_path / "runs")
    assert run_command(["clean", top, "--all", "--yes", "--recipe", "dml*"]) == 0
    assert old.exists()
    assert run_command(["clean", top, "--all", "--yes", "--older-than", "7d"]) == 0
    assert not old.exists()
    assert new.exists()
    assert run_command(["clean", top, "--all", "--older-than", "soon"]) == 2


def test_what_is_never_removed(copy: Callable[..., Path], tmp_path: Path) -> None:
    """A running run; what only looks like one; what holds another, or is behind a link."""
    running, outer = copy("running"), copy("outer")
    shutil.copytree(running, outer / "export/inner")
    project = tmp_path / "runs/project"
    (project / "src").mkdir(parents=True)
    shutil.copy(running / "recipe.json", project)
    (tmp_path / "runs/soup").mkdir()
    (tmp_path / "runs/soup/recipe.json").write_text('{"title": "soup"}')
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(running, elsewhere)
    (tmp_path / "runs/link").symlink_to(elsewhere)
    linked = copy("linked")
    shutil.move(linked / "checkpoints", tmp_path / "saved")
    (linked / "checkpoints").symlink_to(tmp_path / "saved")
    lock = FolderLock(running)
    lock.take()
    before = left_in(tmp_path)
    removals, kept = plan(listed(tmp_path / "runs"), Asked(checkpoints=True))
    assert [one.run.folder for one in removals] == [outer]
    assert "symbolic link" in kept[linked]
    removals, kept = plan(listed(tmp_path / "runs"), EVERYTHING)
    assert [one.run.folder for one in removals] == [linked]
    assert kept.keys() == {running, outer, project, tmp_path / "runs/soup"}
    assert kept[running] == "it is running"
    (alone,) = plan(listed(elsewhere), EVERYTHING)[0]
    assert plan(listed(tmp_path / "runs/link"), EVERYTHING)[0] == []
    assert left_in(tmp_path) == before
    remove(removals[0])
    lock.release()
    remove(alone)
    assert not elsewhere.exists()
    now = left_in(tmp_path)
    assert {path for path in before if str(tmp_path / "saved") in path} <= now.keys()
    assert (tmp_path / "runs/link").is_symlink()


def test_what_a_run_needs_or_others_wrote_stays(copy: Callable[..., Path], tmp_path: Path) -> None:
    def noted(run: Path) -> None:
        (next(run.glob("checkpoints/last-*")) / "notes.txt").write_text("mine")

    def later(run: Path) -> None:
        newest = max(run.glob("checkpoints/last-*"))
        newest.rename(newest.with_name("last-000000099"))

    def rotten(run: Path) -> None:
        (run / "student.safetensors").write_bytes(b"\xff" * 100)

    def lineless(run: Path) -> None:
        (run / "metrics.jsonl").write_text("")

    changes = {"didn't write": noted, "last step": later, "can't be read": rotten}
    changes["only its checkpoints say"] = lineless
    for place, (why, change) in enumerate(changes.items()):
        run = copy(str(place))
        change(run)
        removals, kept = plan(listed(run), Asked(checkpoints=True))
        assert removals == []
        assert why in kept[run]


def test_a_run_that_changed_after_it_was_shown_stays(copy: Callable[..., Path]) -> None:
    run = copy("run")
    for asked in (Asked(checkpoints=True), Asked(every=True)):
        (removal,) = plan(listed(run), asked)[0]
        lock = FolderLock(run)
        lock.take()
        with pytest.raises(UserError, match="another run uses"):
            remove(removal)
        lock.release()
        os.utime(run / "metrics.jsonl")
        before = left_in(run)
        with pytest.raises(UserError, match="has changed"):
            remove(removal)
        assert left_in(run) == before


class Stopped(BaseException):
    """As a kill."""


@pytest.mark.parametrize(
    "asked", [Asked(checkpoints=True), Asked(unfinished=True)], ids=["checkpoints", "run"]
)
def test_a_removal_goes_on_where_it_was_interrupted(
    asked: Asked, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed before each call that changes the disk."""
    for calls in range(100):
        run = copy(f"run{calls}")
        if asked.unfinished:
            unfinished(run)
        left = calls

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Stopped
                return real(*args, **more)

            return call

        (removal,) = plan(listed(run), asked)[0]
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "rename"):
                patch.setattr(os, name, counting(getattr(os, name)))
            try:
                remove(removal)
                whole = True
            except Stopped:
                whole = False
        for found in listed(tmp_path / "runs"):
            again = plan([found], asked)[0]
            assert again or asked.checkpoints
            for one in again:
                remove(one)
        if asked.checkpoints:
            assert checkpoints(run) == []
            assert look_at(run).state == "finished"  # type: ignore[union-attr]
            shutil.rmtree(run)
        assert not (run / "recipe.json").exists()
        if whole:
            break
    assert calls > 5


def test_what_can_not_be_removed_is_said(
    copy: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run, other = unfinished(copy("a")), unfinished(copy("b"))
    real = clean._remove_whole

    def full(folder: Path) -> None:
        if folder == run:
            raise PermissionError(13, "Permission denied")
        real(folder)

    monkeypatch.setattr(clean, "_remove_whole", full)
    assert run_command(["clean", str(tmp_path / "runs"), "--unfinished", "--yes"]) == 2
    said = capsys.readouterr()
    assert "removed 1 run, " in said.out
    assert f"{run} stays: PermissionError" in said.err
    assert "1 run couldn't be removed: run the same command again" in said.err
    assert not other.exists()


def test_a_half_removed_run_that_is_trained_again_is_a_run(copy: Callable[..., Path]) -> None:
    run = unfinished(copy("run"))
    (run / ".removal.tmp7").touch()
    assert look_at(run).state == "failed"  # type: ignore[union-attr]
    facts = json.loads((run / "environment.json").read_text())
    assert "fastokd" in facts, "the sign that fastokd wrote it"
    assert run_command(["train", "--resume", str(run), "--quiet"]) == 0
    assert look_at(run).state == "finished"  # type: ignore[union-attr]
