"""A whole training step as one CUDA graph.

The first steps run as they are, on a side stream: they are training steps like any other, after
which optimizer states exist and libraries have chosen their kernels. The next is captured and
replayed from then on. A batch of another size (the last of an epoch) runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# DistributedDataParallel measures and rebuilds its buckets within the first eleven.
WARM_UP_STEPS = 11

Step = Callable[[Tensor, Tensor], Any]
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class CapturedStep:
    """Calls ``step`` until it is warm, captures it, replays it.

    Args:
        step: (images, labels) to what the step returns; it must read nothing back, and everything
            else that it reads must stay the same tensors.
        record: runs a function of no arguments under capture; gives its result and the replay.
    """

    def __init__(
        self, step: Step, record: Record | None = None, warm_up: int = WARM_UP_STEPS
    ) -> None:
        self.step = step
        self.record = record or record_graph
        self.left = warm_up
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.result: Any = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        if self.left > 0:
            self.left -= 1
            return beside(lambda: self.step(images, labels))
        if self.inputs is None:
            self.inputs = images.clone(), labels.clone()
            held = self.inputs
            self.result, self.replay = self.record(lambda: self.step(*held))
            # A capture runs nothing: this batch's step is the first replay.
        if images.shape != self.inputs[0].shape:
            return self.step(images, labels)
        for kept, new in zip(self.inputs, (images, labels), strict=True):
            kept.copy_(new, non_blocking=True)
        assert self.replay is not None
        self.replay()
        return self.result


def record_graph(body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """``body`` captured: its result's tensors, and the replay that fills them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return result, graph.replay


def beside(body: Callable[[], Any]) -> Any:
    """Runs ``body`` on a side stream that the current one waits for; as it is without a GPU."""
    if not torch.cuda.is_available():
        return body()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = body()
    torch.cuda.current_stream().wait_stream(side)
    return result
