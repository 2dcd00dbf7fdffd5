"""The Triton kernels of the fusion step against float64, by error budget."""

from __future__ import annotations

import math

import pytest
import torch
from fastokd.kernels import fusion_step as kernel

from tests.ops.fusion_cases import assert_within_budget, draw

pytestmark = pytest.mark.gpu


# Two students' last maps; one map, as the transfusion's; three narrow ones, of which no tile is
# full; more than a tile of channels; images of one column and of one row.
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 16, 4, 4), (1, 2, 8, 7, 7), (3, 2, 5, 4, 3), (2, 1, 70, 3, 2), (2, 2, 4, 5, 1)],
)
def test_shapes(shape: tuple[int, int, int, int, int], poisoned_device: torch.device) -> None:
    assert_within_budget(draw(*shape, device=poisoned_device), "triton")


# The fusion of two of ResNet-32's last maps and its transfusion, the fusion of two of ResNet-18's at
# 224 pixels; few and narrow ones under the interpreter.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 128, 64, 8, 8), (1, 128, 64, 8, 8), (2, 256, 512, 7, 7)])
def test_training_shapes(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    m, B, C, H, W = shape
    if poisoned_device.type == "cpu":
        B, C = 1, C // 16
    step = draw(m, B, C, H, W, dtype=dtype, device=poisoned_device)
    assert_within_budget(step, "triton", need_maps=m == 1)


def test_without_the_maps_gradient(poisoned_device: torch.device) -> None:
    assert_within_budget(draw(2, 2, 8, 4, 4, device=poisoned_device), "triton", need_maps=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, poisoned_device: torch.device) -> None:
    assert_within_budget(draw(2, 2, 8, 4, 4, dtype=dtype, device=poisoned_device), "triton")


@pytest.mark.parametrize("rows", [8, 64])
def test_stretches_of_several_tiles(
    rows: int, monkeypatch: pytest.MonkeyPatch, poisoned_device: torch.device
) -> None:
    """75 pixels are 5 tiles of 16: 3 stretches of 2, the last one of them past the end; where a tile
    has 8 or 64 pixels, it ends with the stretch or goes beyond it."""
    monkeypatch.setattr(kernel, "PROGRAMS", 8)
    monkeypatch.setattr(kernel, "_BN", 16)
    monkeypatch.setattr(kernel, "_ROWS", rows)
    assert kernel._splits(75, 8, 16)[:2] == (3, 2)
    assert_within_budget(draw(2, 3, 8, 5, 5, device=poisoned_device), "triton")


def test_mean_a_thousand_deviations_from_zero(poisoned_device: torch.device) -> None:
    assert_within_budget(draw(2, 3, 4, 5, 5, offset=1000.0, device=poisoned_device), "triton")


def test_slices_of_wider_maps(poisoned_device: torch.device) -> None:
    step = draw(2, 2, 8, 3, 3, device=poisoned_device)
    expected = step.run("triton")
    wide = torch.full((2, 3, 3, 24), math.nan, device=poisoned_device).permute(0, 3, 1, 2)
    wide[:, 0:8], wide[:, 16:24] = step.maps
    step.maps[:] = [wide[:, 0:8], wide[:, 16:24]]
    for name, value in step.run("triton").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
