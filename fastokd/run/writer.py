"""Checkpoints are written by a thread of their own, from copies in host memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WRITERS: weakref.WeakSet[Writer] = weakref.WeakSet()


def _finish_before_a_fork() -> None:
    """A forked loader's worker would hold the locks and open files of a write in flight."""
    for writer in list(WRITERS):
        writer.join()


os.register_at_fork(before=_finish_before_a_fork)


class Writer:
    """Runs one write at a time in a thread. The process doesn't end before the write does, unless it is
    killed or calls ``os._exit``."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        WRITERS.add(self)

    def start(self, write: Callable[[], None]) -> None:
        """Starts ``write``; the one before must have been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        thread = threading.Thread(target=run, name="fastokd-writer", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # no more threads are allowed
            run()
        else:
            self._thread = thread

    def join(self) -> None:
        """Waits for the write, if there is one."""
        thread = self._thread  # a fork in another thread may join it as well
        if thread is not None:
            thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits for the write; raises what it raised."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


class HostCopies:
    """Copies of a state in host memory, which is allocated once and pinned for a GPU.

    Copies of a GPU's tensors keep the strides, so that each is one transfer without a temporary on the
    device. Others are contiguous, as safetensors needs them: a permutation by the writer's thread would
    start a second team of OpenMP threads beside the training's.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Queues the copies behind the device's work so far. They replace those of the last call.

        Returns:
            the copies, and a function that waits until they are complete; any thread may call it.
        """
        copies = {name: self._place(name, value) for name, value in tensors.items()}
        self._kept |= copies
        torch._foreach_copy_(list(copies.values()), list(tensors.values()), non_blocking=True)
        events = []
        for device in {value.device for value in tensors.values() if value.is_cuda}:
            event = torch.cuda.Event(blocking=True)  # waiting takes no CPU time
            event.record(torch.cuda.current_stream(device))
            events.append((device, event))

        def wait() -> None:
            for device, event in events:
                with torch.cuda.device(device):  # a new thread's is GPU 0
                    event.synchronize()

        return copies, wait

    def _place(self, name: str, value: Tensor) -> Tensor:
        """The memory for a copy: that of the last one, if it fits."""
        kept = self._kept.get(name)
        if kept is not None and (kept.shape, kept.dtype) == (value.shape, value.dtype):
            return kept
        layout = torch.preserve_format if value.is_cuda else torch.contiguous_format
        return torch.empty_like(value, device="cpu", memory_format=layout, pin_memory=value.is_cuda)
