"""The Triton kernels of the fusion step against float64, by error budget."""

from __future__ import annotations

import math

import pytest
import torch
from fastokd.kernels import fusion_step as kernel

from tests.ops.fusion_cases import assert_within_budget, draw


# Two students' last maps; one map, as the transfusion's; three narrow ones, of which no tile is
# full; more than a tile of channels; images of one column and of one row.
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 16, 4, 4), (1, 2, 8, 7, 7), (3, 2, 5, 4, 3), (2, 1, 70, 3, 2), (2, 2, 4, 5, 1)],
)
def test_shapes(shape: tuple[int, int, int, int, int]) -> None:
    assert_within_budget(draw(*shape), "triton")


def test_without_the_maps_gradient() -> None:
    assert_within_budget(draw(2, 2, 8, 4, 4), "triton", need_maps=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    assert_within_budget(draw(2, 2, 8, 4, 4, dtype=dtype), "triton")


def test_stretches_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """75 pixels are 5 tiles of 16: 3 stretches of 2, the last one of them past the end."""
    monkeypatch.setattr(kernel, "STRETCHES", 4)
    monkeypatch.setattr(kernel, "_BN", 16)
    assert_within_budget(draw(2, 3, 8, 5, 5), "triton")


def test_mean_a_thousand_deviations_from_zero() -> None:
    assert_within_budget(draw(2, 3, 4, 5, 5, offset=1000.0), "triton")


def test_slices_of_wider_maps() -> None:
    step = draw(2, 2, 8, 3, 3)
    expected = step.run("triton")
    wide = torch.full((2, 3, 3, 24), math.nan).permute(0, 3, 1, 2)
    wide[:, 0:8], wide[:, 16:24] = step.maps
    step.maps[:] = [wide[:, 0:8], wide[:, 16:24]]
    for name, value in step.run("triton").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
