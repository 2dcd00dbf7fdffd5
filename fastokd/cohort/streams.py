"""Each student's work on a CUDA stream of its own, forked from the current stream and joined again.

A small network fills a part of the GPU, so in a CUDA graph, where launches cost nothing, students run
side by side. The same streams are used in the eager steps before the capture: libraries allocate a
workspace for each stream at its first use, which mustn't be within the capture, and DDP keeps
accumulators of gradients, which have a stream, from one step to the next.

**Backward.** Autograd runs each node on the stream of its forward, makes a consumer's stream wait for
its producer's, and at the end the stream that called ``backward`` waits for those of all leaves. So
the backward is forked and joined by it, within a capture as outside.

**Memory.** The allocator gives a freed block to the next allocation of the stream that it was made on,
in the order of the host, and doesn't know of other streams that still read it. ``record_stream`` would
tell it, but during a capture recorded blocks aren't reused at all. So what crosses streams (the shared
input, dropout masks, students' outputs) is held by reference until the next forward, that is until
the backward has joined the streams. What the backward sends across streams autograd records; those
are the gradients at the students' inputs and outputs only, and they stay allocated until the capture
ends.

**Random numbers.** A generator's offset is advanced on the host, launch by launch, so each draw is the
same on any stream.

**Ops** must not keep a buffer from call to call: two students may be in the same op at once.

**Compiled**, a forward runs on one stream, in the order that the compiler found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Streams:
    """A stream for each student that runs in this process.

    Args:
        count: the number of students.
        cuda: what has streams; ``torch.cuda`` unless a test gives a recorder. On a CPU there are no
            streams, and the students run one after another.
    """

    def __init__(self, count: int, cuda: Any = None) -> None:
        self.count = count
        self.cuda = cuda
        self.streams: list[Any] = []
        self.held: list[Tensor] = []

    def begin(self) -> None:
        """Before a forward: releases what the step before held."""
        self.held.clear()

    def run(self, work: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
        """``work(*calls[i])`` on the stream of student i, for each; results may be read at once.

        Every tensor that ``work`` reads and that isn't a module's is among its arguments, and every
        one that is read outside of it is in its result.
        """
        read = _tensors(calls)
        device = read[0].device
        cuda = self.cuda or (torch.cuda if device.type == "cuda" else None)
        if cuda is None:
            return [work(*call) for call in calls]
        if not self.streams:
            make = _kept if cuda is torch.cuda else lambda device, _: cuda.Stream(device)
            self.streams = [make(device, index) for index in range(self.count)]
        main = cuda.current_stream(device)
        for stream in self.streams:
            stream.wait_stream(main)
        results = []
        for stream, call in zip(self.streams, calls, strict=True):
            with cuda.stream(stream):
                results.append(work(*call))
        for stream in self.streams:
            main.wait_stream(stream)
        # Without their history: it would keep the step's autograd nodes alive.
        self.held += [x.detach() for x in (*read, *_tensors(results))]
        return results


@functools.cache
def _kept(device: torch.device, index: int) -> torch.cuda.Stream:
    """One stream for each student of the process: cuBLAS keeps a workspace for each that it has seen."""
    return torch.cuda.Stream(device)


def side_by_side(
    work: Callable[..., T], calls: Sequence[tuple[Any, ...]], streams: Streams | None
) -> list[T]:
    """:meth:`Streams.run`, or one call after another where there are no streams."""
    if streams is None or torch.compiler.is_compiling():
        return [work(*call) for call in calls]
    return streams.run(work, calls)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
