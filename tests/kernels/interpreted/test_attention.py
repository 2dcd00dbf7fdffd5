"""The Triton kernels of FFSD's map losses against float64, by error budget."""

from __future__ import annotations

import math

import pytest
import torch
from fastokd.kernels import attention as kernel

from fastokd.errors import UserError
from tests.ops.map_cases import LOSSES, OPS, assert_within_budget, draw, run
from tests.ops.map_edges import Edges


# FFSD's last map; a ragged one, which is not one power of two in any way; 81 pixels, whose threshold
# is found bit by bit.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 13, 7, 7), (1, 5, 9, 9)])
def test_shapes(op: str, shape: tuple[int, int, int, int]) -> None:
    assert_within_budget(op, *draw(*shape, dtype=torch.float32, layout="last"), "triton")


@pytest.mark.parametrize("op", OPS)
def test_channels_first_and_low_precision(op: str) -> None:
    x, y = draw(2, 20, 4, 4, dtype=torch.bfloat16, layout="first")
    assert_within_budget(op, x, y, "triton", incoming=-1.7)


@pytest.mark.parametrize("op", OPS)
def test_many_tiles(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels in three tiles, the last one ragged, as if they were too many for the registers."""
    monkeypatch.setattr(kernel, "_blocks", lambda x: (16, 8))
    assert_within_budget(op, *draw(2, 20, 3, 4, dtype=torch.float32, layout="last"), "triton")


@pytest.mark.parametrize("op", OPS)
def test_strides(op: str) -> None:
    """Slices, steps and broadcasts of a batch; nothing beyond a map is read."""
    x, y = draw(2, 8, 3, 4, dtype=torch.float32, layout="last")
    plain = run(op, x, y, "triton")
    wide = torch.full((2, 3, 4, 24), math.nan).permute(0, 3, 1, 2)
    wide[:, 8:16] = x
    steps = torch.full((4, 3, 4, 8), math.nan).permute(0, 3, 1, 2)
    steps[::2] = y
    for name, value in run(
        op, x if op == "feature" else wide[:, 8:16], steps[::2], "triton"
    ).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    assert_within_budget(op, x[:1].expand(2, 8, 3, 4), y, "triton")


def test_maps_may_differ() -> None:
    x, _ = draw(2, 6, 4, 4, dtype=torch.float16, layout="last")
    _, y = draw(2, 20, 4, 4, dtype=torch.float32, layout="first")
    assert_within_budget("attention", x, y, "triton")


@pytest.mark.parametrize("op", ["attention", "feature"])
def test_equal_maps_are_at_rest(op: str) -> None:
    x, _ = draw(2, 17, 5, 3, dtype=torch.float32, layout="last")
    assert all((v == 0).all() for v in run(op, x, x.clone(), "triton").values())


def test_what_does_not_fit_is_refused() -> None:
    big = torch.zeros(1, 2, 65, 64)
    for op in ("attention", "map", "shifted"):
        with pytest.raises(UserError, match="4160 pixels"):
            run(op, big, big, "triton")
    assert LOSSES["feature"](big, big, impl="triton") == 0


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")  # numpy, of inf
class TestEdges(Edges):
    impl = "triton"
