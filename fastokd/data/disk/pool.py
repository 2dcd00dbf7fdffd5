"""Worker processes that make chunks of batches in shared memory.

The memory is mapped before the workers are forked. So it needs no ``/dev/shm`` (64 MiB in
containers), file, name or descriptor, and it can't run out during a run. Each worker has one pipe,
which closes when the worker ends, so that the main process doesn't wait for a dead worker.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.data.waits import Patience, exhausted
from fastokd.errors import DataFileError, LoaderError, warn
from fastokd.host.memory import free_memory, lines_of, mib

# Chunks queued for each worker, so that it doesn't wait for the next one.
AHEAD = 2
# Chunks may take 1 / SHARE of the free memory.
SHARE = 4
# A worker is given up after so many seconds at the same image.
GIVEN_UP_AFTER = 900.0
# Bytes for each worker's row counter.
ROW = 64
# Signals that reach the whole process group (Ctrl-C, a scheduler). Workers ignore them; the main
# process handles them.
OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STATES = {"T": "stopped", "D": "waiting for the disk", "R": "running", "S": "sleeping"}


class _Worker(NamedTuple):
    """One process, and this process's end of its pipe."""

    pid: int
    pipe: Connection


@dataclass
class _Given:
    """A chunk queued for a worker, its slot, and the worker's answer."""

    chunk: Any
    worker: int
    slot: int
    answer: tuple[str, str] | None = None


class Pool:
    """Makes chunks in order, in processes that start when there is a chunk for them.

    Args:
        make: called with a chunk and a counter of its row; returns the images, uint8 ``[n, ...]`` with
            n at most ``shape[0]``, or a sentence about a damaged file.
        chunks: what to make. The iterator is read ahead.
        shape: the shape of the largest chunk.
        workers: the largest number of processes; fewer are started where memory is short.
        at: returns the path of the image in a row of a chunk.
    """

    def __init__(
        self,
        make: Callable[[Any, Tensor], Tensor | str],
        chunks: Iterator[Any],
        shape: tuple[int, ...],
        workers: int,
        at: Callable[[Any, int], Path],
    ) -> None:
        self._make, self._chunks, self._at = make, chunks, at
        each = torch.Size(shape).numel()
        self.most = _that_fit(workers, AHEAD * each)
        size = self.most * (ROW + AHEAD * each)
        try:
            memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        except (OSError, ValueError, OverflowError) as error:
            raise LoaderError(
                f"there is no memory for the batches of {self.most} workers, {mib(size)}: choose "
                "fewer --workers, or a smaller image_size"
            ) from error
        rows, images = memory[: self.most * ROW], memory[self.most * ROW :]
        self._rows = rows.view(torch.int64).view(self.most, -1)[:, 0]
        self._slots = images.view(self.most * AHEAD, *shape)
        self._workers: list[_Worker] = []
        self._free: deque[int] = deque()
        self._given: deque[_Given] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            # A worker has nothing to save, and SIGKILL reaches a stopped worker too.
            _kill(worker.pid)
        self._workers.clear()

    def feed(self) -> None:
        """Hands out chunks while there are chunks and free slots."""
        while self._free or len(self._workers) < self.most:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            if len(self._workers) < self.most:
                self._start()
            slot = self._free.popleft()
            self._given.append(_Given(chunk, slot // AHEAD, slot))
            worker = self._workers[slot // AHEAD]
            try:
                worker.pipe.send((slot, chunk))
            except OSError:
                self._died(worker)

    def take(self) -> Tensor:
        """The next chunk's images, to be copied before :meth:`feed`.

        Raises:
            DataFileError: a file of the chunk is at fault.
            LoaderError: a worker was killed or hangs, or a resource ran out.
        """
        given = self._given[0]
        patience, row = Patience(), -1
        while given.answer is None:
            now = int(self._rows[given.worker])
            if now != row:  # another image: the disk is slow, not hung
                patience, row = Patience(), now
            if not self._hear(patience.left + 0.1):
                self._tell(given, patience)
        self._given.popleft()
        self._free.append(given.slot)
        kind, said = given.answer
        if kind == "file":
            raise DataFileError(said)
        if kind == "machine":
            raise LoaderError(said)
        assert kind == "made", f"a loader's worker failed:\n{said}"
        return self._slots[given.slot, : int(said)]

    def _hear(self, seconds: float) -> bool:
        """Receives the workers' answers within that time; returns whether there was one."""
        pipes = {worker.pipe: worker for worker in self._workers}
        heard = multiprocessing.connection.wait(list(pipes), seconds)
        for pipe in heard:
            assert isinstance(pipe, Connection)
            try:
                slot, *answer = pipe.recv()
            except (EOFError, OSError):
                self._died(pipes[pipe])
            next(g for g in self._given if g.slot == slot).answer = tuple(answer)
        return bool(heard)

    def _start(self) -> None:
        """Starts a worker. If that fails, the running ones go on."""
        index = len(self._workers)
        slots = self._slots[index * AHEAD : (index + 1) * AHEAD]
        self._rows[index] = 0
        ours = theirs = None
        try:
            ours, theirs = multiprocessing.Pipe()
            with warnings.catch_warnings():
                # The warning is about locks held by other threads. A worker takes none of them.
                warnings.simplefilter("ignore", DeprecationWarning)
                parent = os.getpid()
                pid = _fork()
        except OSError as error:
            for end in (ours, theirs):
                if end is not None:
                    end.close()
            found = exhausted(error, f"worker {index + 1} of {self.most} was started")
            if found is None:
                raise
            if index == 0:
                raise found from error
            warn(f"{found}; {index} workers go on")
            self.most = index
            return
        if pid == 0:
            try:
                ours.close()
                for worker in self._workers:
                    worker.pipe.close()
                _serve(
                    self._make, theirs, slots, index * AHEAD, self._rows[index : index + 1], parent
                )
            finally:
                os._exit(0)
        theirs.close()
        self._workers.append(_Worker(pid, ours))
        self._free.extend(range(index * AHEAD, (index + 1) * AHEAD))

    def _file(self, given: _Given) -> Path:
        """The file that a worker is reading."""
        row = min(int(self._rows[given.worker]), len(given.chunk[0]) - 1)
        return self._at(given.chunk, row)

    def _died(self, worker: _Worker) -> None:
        """Raises an error with the cause of a worker's end."""
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        except ChildProcessError:  # SIGCHLD is ignored, so the exit status is unknown
            code = -signal.SIGKILL
        index = self._workers.index(worker)
        self._workers.remove(worker)
        worker.pipe.close()
        where = f"a loader's worker (process {worker.pid}) "
        given = next((g for g in self._given if g.worker == index and g.answer is None), None)
        doing = f"while it read {self._file(given)}" if given else "while it had nothing to do"
        if code == -signal.SIGKILL:
            free = free_memory()
            left = "" if free is None else f"; {mib(free)} are free now"
            raise LoaderError(
                f"{where}was killed (SIGKILL) {doing}, as the kernel does where memory runs out{left}: "
                f"choose fewer --workers than {self.most} and continue with --resume"
            )
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        )
        raise LoaderError(
            f"{where}{how} {doing}: continue with --resume, and if it ends there again remove that "
            "file and run `fastokd prepare`"
        )

    def _tell(self, given: _Given, patience: Patience) -> None:
        worker = self._workers[given.worker]
        who = f"a loader's worker (process {worker.pid}, {_state(worker.pid)})"
        path = self._file(given)
        if patience.passed > GIVEN_UP_AFTER:
            raise LoaderError(
                f"{who} has been at {path} for {patience.passed:.0f} s: see whether its disk answers, "
                "and continue with --resume"
            )
        patience.tell(f"{who}, which is at {path}")


def _fork() -> int:
    """``os.fork``; the child ignores ``OF_THE_GROUP`` from its start."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_GROUP)
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid == 0:
            for signum in OF_THE_GROUP:
                signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _serve(
    make: Callable[[Any, Tensor], Tensor | str],
    pipe: Connection,
    slots: Tensor,
    first: int,
    row: Tensor,
    parent: int,
) -> None:
    """The worker's loop. It ends when the parent does."""
    # This process must not destroy objects of its parent: a DALI pipeline would wait for threads
    # that don't exist here.
    gc.freeze()
    torch.set_num_threads(1)
    while True:
        # The pipe's other end may be open in a worker that was forked later.
        if not pipe.poll(1.0):
            if os.getppid() != parent:
                return
            continue
        try:
            slot, chunk = pipe.recv()
            pipe.send((slot, *_made(make, chunk, slots[slot - first], row)))
        except (EOFError, OSError):
            return


def _made(
    make: Callable[[Any, Tensor], Tensor | str], chunk: Any, slot: Tensor, row: Tensor
) -> tuple[str, str]:
    """Makes a chunk in its slot: ("made", how many images), or what went wrong."""
    try:
        images = make(chunk, row)
        if isinstance(images, str):
            return "file", images
        slot[: len(images)] = images
        return "made", str(len(images))
    except LoaderError as error:
        return "machine", str(error)
    except BaseException:
        return "bug", traceback.format_exc()


def _that_fit(workers: int, each: int) -> int:
    """How many of ``workers`` fit in memory, at least one. Warns if fewer do."""
    free = free_memory()
    fit = workers if free is None else max(1, min(workers, free // SHARE // each))
    if fit < workers:
        warn(
            f"{mib(free or 0)} of memory are free, and the batches ahead of {workers} workers would take "
            f"{mib(workers * each)}: {fit} are started"
        )
    return fit


def _state(pid: int) -> str:
    """A process's state, from ``/proc``."""
    fields = "".join(lines_of(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return STATES.get(fields[0], fields[0]) if fields else "gone"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):  # it has ended and was reaped elsewhere
        pass
