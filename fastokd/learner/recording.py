"""One capture of a CUDA graph, which may fail and leaves the process able to go on.

A call that a capture forbids (one that waits for the device, say) makes it invalid. Then
``torch.cuda.graph`` raises from its own end and leaves the capture's stream the current one. Under
PyTorch 2.11 the allocator keeps the capture's pool open, too, and the random generator stays in
capture mode, so that the next draw raises "Offset increment outside graph capture"; 2.14 ends both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastokd.errors import UserError, forget, in_one_line

# PyTorch 2.11's pinned-memory allocator still queries a failed graph's stream: it is kept alive.
_FAILED: list[torch.cuda.CUDAGraph] = []


class CaptureError(UserError):
    """The step can't be captured. Nothing of it was computed; its cause says why."""


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, **how: Any
) -> Iterator[None]:
    """``torch.cuda.graph(graph, pool, stream, **how)``. Don't reuse the pool after a failed capture.

    Raises:
        CaptureError: the body can't be captured, and why. Its own UserErrors are raised unchanged.
    """
    before = torch.cuda.current_stream(stream.device)
    first: BaseException | None = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, **how):
            try:
                yield
            except BaseException as error:
                # What the capture's end raises then doesn't say why.
                first = error
                raise
    except BaseException as error:
        cause = first or error
        _end(graph, pool, before)
    else:
        return
    if isinstance(cause, UserError) or not isinstance(cause, Exception):
        raise cause
    forget(cause)
    raise CaptureError(
        f"the step can't be captured as a CUDA graph ({in_one_line(cause)}): leave --capture out"
    ) from cause


def _end(graph: torch.cuda.CUDAGraph, pool: Any, before: torch.cuda.Stream) -> None:
    """Ends what a failed capture began."""
    index = before.device.index
    torch.cuda.set_stream(before)
    graph.reset()
    _FAILED.append(graph)
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        pass  # The pool was closed at the capture's end, and let go by the reset.
    else:
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    # The same seed and offset, in a state that no capture has touched.
    generator.graphsafe_set_state(generator.clone_state())
