"""A run that is stopped loses nothing, and two never write into one folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd import train as training
from fastokd.checkpoint import link_checkpoint, load_checkpoint, save_checkpoint
from fastokd.cli import run_command
from fastokd.errors import Interrupted, UserError
from fastokd.evaluate import Scorer
from fastokd.recipe.names import recipe
from fastokd.run.folder import Run, RunFolder
from fastokd.run.interruption import Keeper, StopRequest
from fastokd.run.lock import FolderLock
from fastokd.run.options import RunOptions
from fastokd.train import train

SAVING = ((signal.SIGTERM, 143), (signal.SIGINT, 130))
# The module, which the function hides.
loop = sys.modules["fastokd.train"]
SMALL = dataclasses.replace(recipe("okddip-branch@3/resnet8/digits", epochs=2), batch_size=50)
OPTIONS = RunOptions(quiet=True, engine="loop", precision="fp32", device="cpu")
assert training is train


def after_step(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Acts inside step ``number`` of the next training, counted from 1."""
    step, taken = loop.training_step, [0]

    def acting(*arguments: Any, **how: Any) -> Any:
        result = step(*arguments, **how)
        taken[0] += 1
        if taken[0] == number:
            act()
        return result

    monkeypatch.setattr(loop, "training_step", acting)


def ends(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """A run's last state, and its metrics but for the clock's."""
    newest = max((folder / "checkpoints").glob("last-*"))
    rows = [
        {k: v for k, v in row.items() if k != "images_per_second" and not k.endswith("seconds")}
        for row in Run.load(folder).metrics
    ]
    return load_checkpoint(newest)[0], rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(SMALL, OPTIONS, out=out)
    return out


@pytest.mark.parametrize(
    ("signum", "code", "step"),
    [
        # Within an epoch, at its end, at the run's.
        *((signum, code, step) for signum, code in SAVING for step in (1, 2, 4)),
        (signal.SIGHUP, 129, 1),
    ],
)
def test_a_signal_saves_the_step_and_a_resumed_run_ends_alike(
    signum: int, code: int, step: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shell's background jobs ignore ^C from the start, and so would the run.
    default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(signum, default)
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        after_step(step, lambda: os.kill(os.getpid(), signum), patch)
        with pytest.raises(Interrupted) as stopped:
            train(SMALL, OPTIONS, out=tmp_path / "run")
    assert stopped.value.code == code
    assert signal.signal(signum, inherited) is before
    assert (tmp_path / f"run/checkpoints/last-{step:09d}").is_dir()
    train(SMALL, OPTIONS, out=tmp_path / "run", resume=True)
    state, rows = ends(tmp_path / "run")
    wanted, wanted_rows = ends(whole)
    assert rows == wanted_rows
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_signal_during_an_evaluation_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Scorer.add

    def adding(scorer: Scorer, *batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(Scorer, "add", add)
        add(scorer, *batch)

    monkeypatch.setattr(Scorer, "add", adding)
    with pytest.raises(Interrupted):
        train(SMALL, OPTIONS, out=tmp_path / "run")
    assert Run.load(tmp_path / "run").metrics == []  # the epoch will be measured when resumed
    assert train(SMALL, OPTIONS, out=tmp_path / "run", resume=True).last["epoch"] == 1


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal\n"
        "from fastokd.run.interruption import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "on\n")


def test_a_hangup_that_is_ignored_from_the_start_stops_nothing() -> None:
    """As under nohup."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, inherited)


def test_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    arguments = ["train", SMALL.name, "--out", str(tmp_path / "run"), "--quiet"]
    arguments += ["--engine", "loop", "--device", "cpu", "--epochs", "2"]
    assert run_command(arguments) == 143
    assert (
        "stopped by SIGTERM; `fastokd train --resume DIR` continues the run"
        in capsys.readouterr().err
    )


def test_state_is_saved_every_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(8, lambda: os._exit, monkeypatch)
    small = dataclasses.replace(SMALL, batch_size=20)  # 5 steps an epoch
    saved: list[str] = []
    save = RunFolder.save

    def saving(folder: RunFolder, session: Any, **how: Any) -> None:
        saved.append(f"{session.step} of {session.epoch}")
        save(folder, session, **how)

    monkeypatch.setattr(RunFolder, "save", saving)
    train(small, OPTIONS, out=tmp_path / "run", save_every_steps=2)
    assert saved == ["2 of 0", "4 of 0", "5 of 1", "7 of 1", "9 of 1", "10 of 2"]


def test_state_is_saved_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("fastokd.run.interruption.time.monotonic", lambda: clock[0])
    saves: list[float] = []
    keeper = Keeper(lambda _: saves.append(clock[0]), StopRequest(), None, 0.5)
    for _ in range(10):
        clock[0] += 10
        keeper.on_step(1)
    assert saves == [30, 60, 90]


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from fastokd.run.lock import FolderLock\n"
        f"lock = FolderLock(Path({str(out)!r}))\n"
        "lock.path.mkdir()\n"
        "lock.take()\n"
        # A loader's worker, which outlives its parent for some seconds.
        "if os.fork() == 0: time.sleep(20); os._exit(0)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        try:
            with pytest.raises(UserError, match="another run uses"):
                train(SMALL, OPTIONS, out=out)
            assert not (out / "recipe.json").exists()
            holder.kill()
            # A dead process holds nothing, whatever children live on.
            train(SMALL, OPTIONS, out=out, max_steps=1)
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_the_folder_is_free_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        after_step(1, fail, patch)
        with pytest.raises(RuntimeError, match="broken"):
            train(SMALL, OPTIONS, out=tmp_path / "run")
    train(SMALL, OPTIONS, out=tmp_path / "run", resume=True, max_steps=1)


def without_locks(*arguments: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command, or resumed; not while it still runs, nor where anything else lies."""

    def fail() -> None:
        raise RuntimeError("broken")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_step(1, fail, patch)
        with pytest.raises(RuntimeError, match="broken"):
            train(SMALL, OPTIONS, out=out)
    for left in ("tuning.json", "data.json", ".recipe.json.tmp1", "checkpoints/.last-1.tmp1"):
        (out / left).write_text("{}")
    lock = FolderLock(out)
    lock.take()
    with pytest.raises(UserError, match=f"another run uses {out}"):
        train(SMALL, OPTIONS, out=out)
    lock.release()
    with monkeypatch.context() as patch:
        patch.setattr("fastokd.run.lock.fcntl.flock", without_locks)
        with pytest.raises(UserError, match="exists already and is never overwritten"):
            train(SMALL, OPTIONS, out=out)
    for other in (
        "notes.txt",
        "metrics.jsonl",
        "student.safetensors",
        "checkpoints/last-000000001",
    ):
        (out / other).touch()
        with pytest.raises(UserError, match="exists already and is never overwritten"):
            train(SMALL, OPTIONS, out=out)
        (out / other).unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.json").write_text("a cake")
    with pytest.raises(UserError, match="exists already and is never overwritten"):
        train(SMALL, OPTIONS, out=tmp_path / "mine")
    train(SMALL, OPTIONS, out=out)
    assert ends(out)[1] == ends(whole)[1]
    assert not (out / "tuning.json").exists()


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(SMALL, OPTIONS, out=out, max_steps=1)
    (out / "checkpoints/.last-000000002.tmp999").mkdir()
    (out / ".metrics.jsonl.tmp999").write_text("half")
    train(SMALL, OPTIONS, out=out, resume=True, max_steps=2)
    assert list(out.rglob(".*")) == []


def test_the_best_checkpoint_takes_no_second_place_on_the_disk(whole: Path) -> None:
    best = next((whole / "checkpoints").glob("best-*"))
    last = best.with_name(best.name.replace("best", "last"))
    if last.is_dir():  # the last epochs' alone are kept
        ours, theirs = (path / "state.safetensors" for path in (best, last))
        assert ours.stat().st_ino == theirs.stat().st_ino
    facts = json.loads((best / "state.json").read_text())
    assert facts["best_on"] == "val"


def test_a_linked_checkpoint_outlives_the_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best-1", {"x": torch.ones(3)}, {"step": 1})
    link_checkpoint(tmp_path / "best-1", tmp_path / "last-1")
    save_checkpoint(tmp_path / "best-1", {"x": torch.zeros(3)}, {"step": 2})
    tensors, facts = load_checkpoint(tmp_path / "last-1")
    assert torch.equal(tensors["x"], torch.ones(3))
    assert facts == {"step": 1}
