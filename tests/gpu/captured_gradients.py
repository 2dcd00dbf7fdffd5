"""Forward and backward of a recipe as a CUDA graph, and what the graph looks like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import OurLoop
from fastokd.learner.step import gradients
from fastokd.run.options import RunOptions
from tests.learner.every_method import small


class Captured:
    """Forward and backward of a recipe as a graph; on a CPU they are called."""

    def __init__(
        self,
        device: torch.device,
        method: str,
        sharing: str,
        precision: str,
        *,
        engine: str = "loop",
        streams: bool = False,
    ) -> None:
        options = RunOptions(
            device=str(device), engine=engine, precision=precision, deterministic=True
        )
        loop = OurLoop(small(method, sharing, batch_size=32), options)
        self.learner = loop.session.learner
        with self.learner.autocast():
            self.learner.cohort.set_engine(engine, streams)
        self.images_BHWC, self.labels_B = loop.images_BHWC.clone(), loop.labels_B.clone()
        loop.session.begin_step(len(self.labels_B))
        self.graph: Any = None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.made = self.step()
        self.graph.instantiate()

    def step(self) -> list[Tensor]:
        """Losses and gradients."""
        for parameter in self.learner.parameters():
            parameter.grad = None
        _, loss = gradients(self.learner, self.images_BHWC, self.labels_B)
        grads = [p.grad for p in self.learner.parameters() if p.grad is not None]
        return [loss.total.detach(), *loss.parts.values(), *grads]

    def __call__(self, seed: int) -> list[Tensor]:
        """:meth:`step` on drawn images."""
        generator = torch.Generator().manual_seed(seed)
        images_BHWC = torch.randint(
            256, self.images_BHWC.shape, dtype=torch.uint8, generator=generator
        )
        self.images_BHWC.copy_(images_BHWC)
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return [x.clone() for x in self.made]


def edges(captured: Captured) -> tuple[int, list[tuple[int, int]]]:
    """The number of nodes of the graph, and its edges."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    graph = runtime.cudaGraph_t(captured.graph.raw_cuda_graph())

    def read(get: Callable[..., Any]) -> Any:
        error, *_, count = get(graph)
        assert int(error) == 0
        error, *lists, _ = get(graph, count)
        assert int(error) == 0
        return [[int(node) for node in nodes] for nodes in lists[:2]]

    (nodes,) = read(runtime.cudaGraphGetNodes)
    return len(nodes), list(zip(*read(runtime.cudaGraphGetEdges), strict=True))


def path(nodes: int, edges: list[tuple[int, int]]) -> tuple[int, int]:
    """The number of nodes, and how many of them are on the longest path."""
    following, waits = defaultdict[int, list[int]](list), defaultdict[int, int](int)
    for a, b in edges:
        following[a].append(b)
        waits[b] += 1
    ready = [a for a in following if not waits[a]]
    length = dict.fromkeys(ready, 1)
    while ready:
        a = ready.pop()
        for b in following[a]:
            length[b] = max(length.get(b, 0), length[a] + 1)
            waits[b] -= 1
            if not waits[b]:
                ready.append(b)
    return nodes, max(length.values())
