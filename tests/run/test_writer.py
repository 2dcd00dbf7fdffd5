"""One thread writes checkpoints from copies: of one moment, one at a time, and never cut short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastokd.checkpoint import list_checkpoints, load_checkpoint
from fastokd.run import folder as run_folder
from fastokd.run.folder import RunFolder
from fastokd.run.writer import HostCopies, Writer
from tests.faults.test_disk import state_of


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints aren't written before it is open."""
    opened, save = threading.Event(), run_folder.save_checkpoint

    def saving(path: Path, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
        opened.wait(60)
        save(path, tensors, facts)

    monkeypatch.setattr(run_folder, "save_checkpoint", saving)
    yield opened
    opened.set()


def test_what_is_written_is_the_state_when_it_was_saved(
    tmp_path: Path, gate: threading.Event
) -> None:
    """Training changes the tensors in place meanwhile."""
    folder, session = RunFolder(tmp_path), state_of(1)
    folder.save(session, background=True)
    for value in session.state()[0].values():
        value.fill_(7)
    session.step = 99
    assert list_checkpoints(folder.checkpoints) == []
    gate.set()
    folder.close()
    (written,) = list_checkpoints(folder.checkpoints)
    assert written.name == "last-000000001"
    wanted = state_of(1).state()[0]
    found = load_checkpoint(written)[0]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state_of(1), background=True)
    second = threading.Thread(target=lambda: folder.save(state_of(2), background=True))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    gate.set()
    second.join()
    folder.close()
    names = [path.name for path in list_checkpoints(folder.checkpoints)]
    assert names == ["last-000000002", "last-000000001"]


def test_a_writers_error_is_raised_once_by_who_waits() -> None:
    def fail() -> None:
        raise ValueError("broken")

    writer = Writer()
    writer.start(fail)
    writer.join()
    with pytest.raises(ValueError, match="broken"):
        writer.wait()
    writer.wait()
    writer.start(lambda: None)
    writer.wait()


def test_a_process_without_another_thread_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    written: list[threading.Thread] = []
    writer = Writer()
    writer.start(lambda: written.append(threading.current_thread()))
    writer.wait()
    assert written == [threading.current_thread()]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with a writer ``writer`` that is at ``write``."""
    before = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from fastokd.run.interruption import StopRequest\n"
        "from fastokd.run.writer import Writer\n"
        "begun, writer = threading.Event(), Writer()\n"
        "def write():\n"
        "    begun.set(); time.sleep(SECONDS); print('written', flush=True)\n"
    )
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)


def test_a_fork_waits_for_the_write() -> None:
    """A loader's worker would hold its locks and its open files."""
    done = run(
        "SECONDS = 0.5\n"
        "writer.start(write); begun.wait()\n"
        "if os.fork() == 0: print('child', threading.active_count(), flush=True); os._exit(0)\n"
        "os.wait(); print('parent', flush=True)\n"
    )
    assert done.stdout.splitlines() == ["written", "child 1", "parent"], done.stderr


def test_an_error_elsewhere_does_not_cut_a_write_short() -> None:
    done = run("SECONDS = 0.5\nwriter.start(write); begun.wait()\nraise SystemExit(3)\n")
    assert (done.returncode, done.stdout) == (3, "written\n")


def test_a_second_signal_does_not_wait_for_a_write() -> None:
    done = run(
        "SECONDS = 60\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    writer.start(write); begun.wait()\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    writer.wait()\n"
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_copies_keep_values_and_layout_and_are_made_in_the_same_memory() -> None:
    tensors = {
        "dense": torch.randn(4, 3, 5, 5),
        "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "sliced": torch.randn(6, 6)[::2, 1::2],
        "count": torch.tensor(5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    copies = HostCopies()
    first, wait = copies.take(tensors)
    wait()
    assert first.keys() == tensors.keys()
    assert all(torch.equal(first[name], value) for name, value in tensors.items())
    assert all(value.is_contiguous() for value in first.values())
    assert not any(value.requires_grad for value in first.values())
    places = {name: value.data_ptr() for name, value in first.items()}
    changed = {name: value.detach() + 1 for name, value in tensors.items()}
    copies.take({name: changed[name] for name in ("dense", "count")})
    second, wait = copies.take({**changed, "dense": torch.zeros(2)})
    wait()
    assert torch.equal(second["dense"], torch.zeros(2))
    kept = ("channels_last", "count", "bytes", "parameter")
    assert all(torch.equal(second[name], changed[name]) for name in kept)
    assert all(second[name].data_ptr() == places[name] for name in kept)


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    folder = RunFolder(tmp_path)
    for step in range(1, 4):
        folder.save(state_of(step), background=True)
    folder.close()
    assert threading.active_count() == before
    assert os.listdir(folder.checkpoints) != []


def test_another_error_in_the_background_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next save isn't lost by it: it writes."""
    save = run_folder.save_checkpoint

    def short(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(run_folder, "save_checkpoint", short)
    folder, session = RunFolder(tmp_path), state_of(1)
    folder.save(session, background=True)
    folder.writer.join()
    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    folder.save(session)
    folder.close()
    assert "no room; training continues until the next save" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == ["last-000000001"]
