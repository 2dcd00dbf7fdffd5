"""Loader workers that are killed, stopped, or more than the machine has room for: every wait ends,
with a sentence."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastokd.checkpoint import newest_checkpoint
from fastokd.data import DiskSplit, DiskStream, load_dataset, stream_of, waits
from fastokd.data.disk import pool
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.scan import look_at
from fastokd.data.photographs import write_photographs
from fastokd.errors import LoaderError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, classes=2, train=48, val=2, size=(40, 30))
    prepare(root, quiet=True)
    return root


def streamed(root: Path, workers: int = 2) -> DiskStream:
    splits = load_dataset(
        "imagenet", root, image_size=32, eval_resize=0, loader="torchvision", workers=workers
    )
    assert isinstance(splits.train, DiskSplit)
    stream = stream_of(splits.train, 16)
    assert isinstance(stream, DiskStream)
    return stream


def children(pid: int | str = "self") -> list[int]:
    """The processes that a process began, without those that earlier tests have left to this one."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    return [child for child in found if child not in _earlier]


_earlier: list[int] = []


@pytest.fixture(autouse=True)
def earlier() -> None:
    """Such as the compiler's own workers, which stay."""
    _earlier.clear()
    _earlier[:] = children()


def send(signum: int) -> None:
    for pid in children():
        os.kill(pid, signum)


def same(a: Iterator[tuple[Tensor, Tensor]], b: Iterator[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("signum", "says"),
    [
        (
            signal.SIGKILL,
            r"was killed \(SIGKILL\) while it (read .*JPEG|had nothing to do), as the ",
        ),
        (
            signal.SIGUSR1,
            r"was ended by SIGUSR1 while it (read .*JPEG|had nothing to do): continue",
        ),
    ],
)
def test_a_worker_that_dies_is_named(root: Path, signum: int, says: str) -> None:
    batches = streamed(root).batches(0)
    next(batches)
    # Stopped, they can't have made the rest already.
    assert len(children()) == 2
    send(signum)
    began = time.monotonic()
    with pytest.raises(LoaderError, match=says):
        list(batches)
    assert time.monotonic() - began < 5
    assert children() == []


def test_what_is_sent_to_the_group_doesn_t_end_workers(root: Path) -> None:
    """The run finishes its step, for which it needs them."""
    stream = streamed(root)
    batches = stream.batches(0)
    first = next(batches)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        send(signum)
    assert same(iter([first, *batches]), stream.batches(0))


def test_a_signal_before_a_worker_has_begun_doesn_t_end_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork

    def slowly() -> int:
        pid = fork()
        if pid == 0:
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), signum)
        return pid

    monkeypatch.setattr(os, "fork", slowly)
    assert len(list(streamed(root).batches(0))) == 6


def test_a_slow_worker_is_told_of_and_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = streamed(root)
    whole = list(stream.batches(0))
    monkeypatch.setattr(waits, "TELL_AFTER", 0.3)
    heard = pool.Pool._hear

    def hear(self: pool.Pool, seconds: float) -> bool:
        found = heard(self, seconds)
        if not found and "stopped" in capsys.readouterr().err:
            send(signal.SIGCONT)
        return found

    monkeypatch.setattr(pool.Pool, "_hear", hear)
    batches = stream.batches(0)
    seen = [next(batches)]
    send(signal.SIGSTOP)
    seen += batches
    assert same(iter(seen), iter(whole))
    monkeypatch.setattr(pool, "GIVEN_UP_AFTER", 0.5)
    monkeypatch.setattr(pool.Pool, "_hear", heard)
    batches = stream.batches(0)
    next(batches)
    send(signal.SIGSTOP)
    with pytest.raises(LoaderError, match=r"\(process \d+, stopped\) has been at .*JPEG for \d s"):
        list(batches)
    said = capsys.readouterr().err
    assert "s of waiting for a loader's worker (process" in said
    assert ".JPEG: is the disk slow, or hung?" in said
    assert children() == []


def test_a_worker_that_goes_on_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a part takes, each of its images was read in time."""
    monkeypatch.setattr(waits, "TELL_AFTER", 0.2)
    monkeypatch.setattr(pool, "GIVEN_UP_AFTER", 1.0)

    def make(part: list[list[int]], row: Tensor) -> Tensor:
        for number in part[0]:
            row.fill_(number)
            time.sleep(0.1)
        return torch.ones(1, 4, dtype=torch.uint8)

    parts = iter([[list(range(30))]])
    with pool.Pool(make, parts, (1, 4), 1, lambda part, row: Path(str(row))) as slow:
        slow.feed()
        assert slow.take().tolist() == [[1] * 4]


def test_workers_end_with_the_run(root: Path) -> None:
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        try:
            torch.set_num_threads(1)  # those of the test's process aren't here
            batches = streamed(root).batches(0)
            next(batches)
            os.write(writer, json.dumps(children()).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(run, 0)
    pids = json.loads(os.read(reader, 1000))
    os.close(reader)
    os.close(writer)
    assert len(pids) == 2
    until = time.monotonic() + 5
    while any(pool._state(pid) not in ("gone", "Z") for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def shared_files(process: str) -> set[str]:
    maps = Path(f"/proc/{process}/maps").read_text()
    files = [
        os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir() if file.is_symlink()
    ]
    return {word for word in (*maps.split(), *files) if word.startswith("/dev/shm")}


def test_workers_need_no_shared_files(root: Path) -> None:
    """Neither /dev/shm, which may be small, nor names of sockets, which may be too long."""
    own = shared_files("self")  # a semaphore of this process's is inherited
    batches = streamed(root).batches(0)
    next(batches)
    for pid in children():
        assert shared_files(str(pid)) <= own
    batches.close()


@contextmanager
def open_files(more: int) -> Iterator[None]:
    """As many as there are, and so many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]  # no gaps below
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1 + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


def test_as_many_workers_as_there_are_files_for(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = streamed(root, workers=6)
    whole = list(stream.batches(0))
    # Two for a pipe, one of which stays; one for what waits on them.
    with open_files(4):
        assert same(stream.batches(0), iter(whole))
    assert "Too many open files while worker 4 of 6 was started: raise `ulimit -n`" in (
        said := capsys.readouterr().err
    )
    assert "; 3 workers go on" in said
    with open_files(0), pytest.raises(LoaderError, match="Too many open files while worker 1 of 6"):
        list(stream.batches(0))
    # Which isn't the fault of the image that was looked at just then.
    image = stream.split.path(0)
    with open_files(0), pytest.raises(LoaderError, match=f"Too many open files while {image} was"):
        look_at(image)


def test_as_many_workers_as_there_is_memory_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = streamed(root, workers=6)
    whole = list(stream.batches(0))
    # A part of 16 images takes 48 KiB, and a worker has two before it.
    monkeypatch.setattr(pool, "free_memory", lambda: 4 * 2 * 2 * 16 * 32 * 32 * 3)
    batches = stream.batches(0)
    seen = [next(batches)]
    assert len(children()) == 2
    assert same(iter([*seen, *batches]), iter(whole))
    assert "1 MiB of memory are free, and the batches ahead of 6 workers" in capsys.readouterr().err
    monkeypatch.setattr(pool, "free_memory", lambda: 0)
    assert same(stream.batches(0), iter(whole))
    assert "1 are started" in capsys.readouterr().err


def test_waits_of_threads_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waits, "TELL_AFTER", 0.1)
    slow = list(
        waits.by_threads(lambda s: time.sleep(s) or s, [0.0, 0.5], 2, lambda s: f"file {s}")
    )
    assert slow == [0.0, 0.5]
    assert "0 s of waiting for file 0.5: is the disk slow, or hung?" in capsys.readouterr().err
    watch = waits.Watch(lambda: "DALI")
    with watch:
        time.sleep(0.3)
    watch.end()
    assert "waiting for DALI" in capsys.readouterr().err


def test_a_run_whose_worker_is_killed_saves_and_continues(root: Path, tmp_path: Path) -> None:
    """Where names of sockets would be too long."""
    long = tmp_path / ("x" * 150)
    long.mkdir()
    words = (
        "train baseline/resnet8/imagenet --epochs 400 --batch-size 48 --image-size 32 --engine loop"
    )
    words += " --loader torchvision --workers 2 --eval-every 400 --set eval_resize=32"
    command = [sys.executable, "-m", "fastokd", *words.split(), "--data-root", str(root)]
    command += ["--out", str(tmp_path / "run")]
    log = (tmp_path / "log").open("w+")
    run = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(long)}, stdout=log, stderr=log
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run/metrics.jsonl").exists() or not (workers := children(run.pid)):
            assert run.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        assert run.wait(60) == 2
    finally:
        run.kill()
        log.close()
    said = (tmp_path / "log").read_text()
    assert "was killed (SIGKILL) while it" in said
    assert "choose fewer --workers than 2 and continue with --resume" in said
    assert newest_checkpoint(tmp_path / "run/checkpoints")[2]["step"] > 0
