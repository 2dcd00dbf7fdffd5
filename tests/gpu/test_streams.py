"""Students on streams of their own, in a real graph: the bits of one stream, and parallel edges."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from tests.gpu.captured_gradients import Captured, edges, path

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_kernel_selection")]
REPLAYS = 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "sharing"), [("okddip", "branch"), ("dml", "network"), ("ffsd", "network")]
)
def test_gradients_are_those_of_one_stream(
    device: torch.device, method: str, sharing: str, precision: str
) -> None:
    """Bit for bit over many replays: a tensor that is overwritten too early shows."""
    one, several = (
        Captured(device, method, sharing, precision, streams=how) for how in (False, True)
    )
    for seed in range(REPLAYS if device.type == "cuda" else 1):
        theirs, ours = one(seed), several(seed)
        assert len(theirs) == len(ours)
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
        assert theirs[-1].any()


@pytest.mark.parametrize(
    ("method", "sharing", "serial"),
    [("okddip", "branch", 0.9), ("dml", "network", 0.6), ("ffsd", "network", 0.6)],
)
def test_students_are_parallel_in_the_graph(
    device: torch.device, method: str, sharing: str, serial: float
) -> None:
    """``serial``: the most of the graph's nodes that may lie on one path, with three students."""
    if device.type != "cuda":
        pytest.skip("a CPU has no graphs")
    one, several = (
        edges(Captured(device, method, sharing, "bf16", streams=how)) for how in (False, True)
    )
    nodes, longest = path(*one)
    assert longest >= 0.95 * nodes
    nodes, longest = path(*several)
    assert longest <= serial * nodes
    into, out = defaultdict[int, int](int), defaultdict[int, int](int)
    for a, b in several[1]:
        out[a] += 1
        into[b] += 1
    # The fork of the forward, and the join before the loss.
    assert max(out.values()) >= 3
    assert max(into.values()) >= 3


def test_the_longest_path_is_found() -> None:
    assert path(5, [(1, 2), (1, 3), (3, 4), (2, 5), (4, 5)]) == (5, 4)
