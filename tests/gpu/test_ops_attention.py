"""The Triton kernels of FFSD's map losses against float64, by error budget."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from fastokd.kernels import attention as kernel
from fastokd.kernels import feature_transfer as transfer
from torch import Tensor

from fastokd.errors import UserError
from tests.ops.map_cases import LOSSES, OPS, assert_within_budget, draw, near_tie, run
from tests.ops.map_edges import Edges

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# FFSD's last map; a ragged one, which is not one power of two in any way; 81 pixels, whose threshold
# is found bit by bit.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 13, 7, 7), (1, 5, 9, 9)])
def test_shapes(op: str, shape: tuple[int, int, int, int], poisoned_device: torch.device) -> None:
    x, y = draw(*shape, dtype=torch.float32, layout="last", device=poisoned_device)
    assert_within_budget(op, x, y, "triton")


# ResNet-32's last maps, and ResNet-18's at 224 pixels; few and narrow ones under the interpreter.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (256, 512, 7, 7)])
def test_training_shapes(
    op: str, dtype: torch.dtype, shape: tuple[int, int, int, int], poisoned_device: torch.device
) -> None:
    B, C, H, W = shape
    if poisoned_device.type == "cpu":
        B, C = 2, C // 16
    x, y = (m.to(poisoned_device) for m in without_ties((B, C, H, W), dtype))
    # As from a GradScaler: in fp16 a gradient would round to 0.
    assert_within_budget(op, x, y, "triton", incoming=65536.0 if dtype == torch.float16 else 1.0)


@lru_cache(maxsize=7)
def without_ties(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two maps in which rounding moves no pixel across the target's threshold."""
    drawn = (draw(*shape, dtype=dtype, layout="last", seed=seed) for seed in range(20))
    return next((x, y) for x, y in drawn if not near_tie(y))


@pytest.mark.parametrize("op", OPS)
def test_channels_first_and_low_precision(op: str, poisoned_device: torch.device) -> None:
    x, y = draw(2, 20, 4, 4, dtype=torch.bfloat16, layout="first", device=poisoned_device)
    assert_within_budget(op, x, y, "triton", incoming=-1.7)


@pytest.mark.parametrize("BP", [4, 16])
@pytest.mark.parametrize("op", OPS)
def test_many_tiles(
    op: str, BP: int, monkeypatch: pytest.MonkeyPatch, poisoned_device: torch.device
) -> None:
    """Channels in three tiles, the last one ragged, as if they were too many for the registers;
    pixels in one block, and in three, the last one ragged, of four."""
    monkeypatch.setattr(kernel, "_blocks", lambda *_: (BP, 16 // BP, 8))
    x, y = draw(2, 20, 3, 3, dtype=torch.float32, layout="last", device=poisoned_device)
    assert_within_budget(op, x, y, "triton")


@pytest.mark.parametrize("op", OPS)
def test_blocks_of_pixels(op: str, poisoned_device: torch.device) -> None:
    """784 pixels in seven blocks of 128, the last one ragged, of eight."""
    assert kernel._blocks(784, 64) == (128, 8, 64)
    x, y = (m.to(poisoned_device) for m in without_ties((2, 64, 28, 28), torch.float32))
    assert_within_budget(op, x, y, "triton")


@pytest.mark.parametrize("layout", ["last", "first"])
def test_samples_over_several_programs(
    layout: str, monkeypatch: pytest.MonkeyPatch, poisoned_device: torch.device
) -> None:
    """50 tiles in 10 stretches, 5 samples in tiles of 2: nothing of it is even, and nothing is atomic."""
    for name, value in (("_BLOCK", 16), ("_TERMS", 5), ("_SAMPLES", 2), ("_STRETCHES", 4)):
        monkeypatch.setattr(transfer, name, value)
    x, y = draw(5, 17, 7, 7, dtype=torch.float32, layout=layout, device=poisoned_device)
    with monkeypatch.context() as few:
        few.setattr(transfer, "PROGRAMS", 7)
        assert_within_budget("feature", x, y, "triton", incoming=-1.7)
    found, again = (run("feature", x, y, "triton") for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("op", OPS)
def test_strides(op: str, poisoned_device: torch.device) -> None:
    """Slices, steps and broadcasts of a batch; nothing beyond a map is read."""
    x, y = draw(2, 8, 3, 4, dtype=torch.float32, layout="last", device=poisoned_device)
    plain = run(op, x, y, "triton")
    wide = torch.full((2, 3, 4, 24), math.nan, device=poisoned_device).permute(0, 3, 1, 2)
    wide[:, 8:16] = x
    steps = torch.full((4, 3, 4, 8), math.nan, device=poisoned_device).permute(0, 3, 1, 2)
    steps[::2] = y
    # The whole maps' slices have a kernel of their own, which may add up in another order.
    rtol, atol = (1e-6, 1e-9) if op == "feature" else (0.0, 0.0)
    for name, value in run(op, wide[:, 8:16], steps[::2], "triton").items():
        torch.testing.assert_close(value, plain[name], rtol=rtol, atol=atol)
    assert_within_budget(op, x[:1].expand(2, 8, 3, 4), y, "triton")


def test_maps_may_differ(poisoned_device: torch.device) -> None:
    x, _ = draw(2, 6, 4, 4, dtype=torch.float16, layout="last", device=poisoned_device)
    _, y = draw(2, 20, 4, 4, dtype=torch.float32, layout="first", device=poisoned_device)
    assert_within_budget("attention", x, y, "triton")


@pytest.mark.parametrize("op", ["attention", "feature"])
def test_equal_maps_have_zero_gradients(op: str, poisoned_device: torch.device) -> None:
    x, _ = draw(2, 17, 5, 3, dtype=torch.float32, layout="last", device=poisoned_device)
    assert all((v == 0).all() for v in run(op, x, x.clone(), "triton").values())


def test_what_does_not_fit_is_refused(poisoned_device: torch.device) -> None:
    big = torch.zeros(1, 2, 65, 64, device=poisoned_device)
    for op in ("attention", "map", "shifted"):
        with pytest.raises(UserError, match="4160 pixels"):
            run(op, big, big, "triton")
    assert LOSSES["feature"](big, big, impl="triton") == 0


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")  # numpy, of inf
class TestEdges(Edges):
    impl = "triton"

    @pytest.fixture(autouse=True)
    def _there(self, poisoned_device: torch.device) -> None:
        self.device = poisoned_device
