"""A whole training step as CUDA graphs, one for each shape of its inputs.

The first steps run eagerly: then optimizer states exist, DDP has built its buckets and libraries have
chosen their kernels. After them a shape that has run eagerly is captured when it comes again, and
replayed from then on. An epoch's smaller last batch runs eagerly in the first epoch and has its own
graph from the second one on.

Eager steps and captures share one side stream: autograd and DDP accumulate a gradient on the stream
where its accumulator was made, and the allocator has a memory pool for each stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastokd.device import release_memory
from fastokd.errors import UserError
from fastokd.learner.recording import recording

# DistributedDataParallel measures and rebuilds its buckets within the first eleven.
WARM_UP_STEPS = 11

Step = Callable[..., Any]
Replay = Callable[[], None]
Record = Callable[[Callable[[], Any]], tuple[Any, Replay]]


def check_captures(device: torch.device) -> None:
    """Raises where ``device`` can't capture a CUDA graph."""
    if device.type != "cuda":
        raise UserError(
            f"capture is asked for on {device}, but only a GPU has graphs: leave --capture out"
        )


class CapturedStep:
    """Calls ``step`` until it is warm, captures it for each shape of its inputs, replays it.

    Tensors among the inputs are copied into the graph's own. Other inputs are constants of a graph:
    each value has a graph of its own.

    Args:
        step: the inputs (images and labels, say) to the step's result, without gradient history. It
            must not read from the device, and whatever else it reads must stay the same tensors.
        device: where the step runs.
        record: captures a function without arguments; returns its result and the replay.
        warm_up: eager steps before the first capture.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        record: Record | None = None,
        warm_up: int = WARM_UP_STEPS,
    ) -> None:
        self.step = step
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.record = record or self._record_graph
        self.left = warm_up
        self.graphs: dict[tuple[Any, ...], _Graph | None] = {}

    def __call__(self, *inputs: Any) -> Any:
        kind = _kind(inputs)
        if self.left > 0 or kind not in self.graphs:
            self.left -= 1
            self.graphs[kind] = None
            return self._beside(lambda: self.step(*inputs))
        graph = self.graphs[kind]
        if graph is None:
            # A capture computes nothing: the first replay is this step.
            graph = self.graphs[kind] = _Graph(self.step, self.record, inputs)
        return graph(inputs)

    def has_run(self, *inputs: Any) -> bool:
        """Whether inputs of this shape have come before."""
        return _kind(inputs) in self.graphs

    def release(self) -> None:
        """Returns the graphs' memory, which nothing else can use; each shape is captured again when it
        comes again."""
        if any(self.graphs.values()):
            self.graphs = dict.fromkeys(self.graphs)
            if self.device.type == "cuda":
                self.pool = torch.cuda.graph_pool_handle()
            release_memory(self.device)

    def _record_graph(self, body: Callable[[], Any]) -> tuple[Any, Replay]:
        """Captures ``body``: its result's tensors, and the replay that fills them.

        The graphs share one memory pool: they never run at the same time, and a step's result is read
        before the next step.
        """
        assert self.stream is not None
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's threads may allocate during the capture.
        with recording(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            result = body()
        return result, graph.replay

    def _beside(self, body: Callable[[], Any]) -> Any:
        """Runs ``body`` on the side stream, ordered with the current one; as it is on a CPU."""
        if self.stream is None:
            return body()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = body()
        current.wait_stream(self.stream)
        return result


def _kind(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.shape if isinstance(x, Tensor) else x for x in inputs)


class _Graph:
    """One captured step: its inputs, its result's tensors, its replay."""

    def __init__(self, step: Step, record: Record, inputs: tuple[Any, ...]) -> None:
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        self.result, self.replay = record(lambda: step(*self.inputs))

    def __call__(self, inputs: tuple[Any, ...]) -> Any:
        for kept, new in zip(self.inputs, inputs, strict=True):
            if isinstance(new, Tensor):
                kept.copy_(new, non_blocking=True)
        self.replay()
        return self.result
