"""Normalisation: torchvision's numbers, one operation, channels-last without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as tv

from fastokd.errors import UserError
from fastokd.ops.normalize import normalize

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Recorder(TorchDispatchMode):
    """The names of the operations that run inside, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def batch(B: int = 5, H: int = 6, W: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    mean_C, std_C = torch.tensor(MEAN), torch.tensor(STD)
    images_BHWC = torch.randint(256, (B, H, W, 3), dtype=torch.uint8)
    return images_BHWC, 1 / (255 * std_C), -mean_C / std_C


def test_equals_torchvision() -> None:
    images_BHWC, scale_C, shift_C = batch()
    theirs = tv.normalize(images_BHWC.permute(0, 3, 1, 2).double() / 255, MEAN, STD)
    ours = normalize(images_BHWC, scale_C, shift_C)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_full_and_rounds_once(dtype: torch.dtype) -> None:
    images_BHWC, scale_C, shift_C = batch()
    if dtype == torch.float64:
        scale_C, shift_C = scale_C.double(), shift_C.double()
    ours = normalize(images_BHWC, scale_C, shift_C, dtype)
    wide = torch.addcmul(shift_C, images_BHWC.to(scale_C.dtype), scale_C).to(dtype)
    assert torch.equal(ours, wide.permute(0, 3, 1, 2))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_one_operation(dtype: torch.dtype) -> None:
    images_BHWC, scale_C, shift_C = batch()
    with Recorder() as recorder:
        normalize(images_BHWC, scale_C, shift_C, dtype)
    assert recorder.names == ["aten.empty.memory_format", "aten.addcmul.out"]


def test_reads_strided_images() -> None:
    """A view, as an unshuffled stream gives and as a slice of a larger batch."""
    images_BHWC, scale_C, shift_C = batch(B=8)
    view_BHWC = images_BHWC[::2].transpose(1, 2)
    expected = normalize(view_BHWC.contiguous(), scale_C, shift_C)
    assert torch.equal(normalize(view_BHWC, scale_C, shift_C), expected)


def test_empty_batch() -> None:
    images_BHWC, scale_C, shift_C = batch(B=0)
    assert normalize(images_BHWC, scale_C, shift_C).shape == (0, 3, 6, 7)


def test_normalised_images_pass_unchanged() -> None:
    _, scale_C, shift_C = batch()
    x_BCHW = torch.randn(2, 3, 4, 4)
    assert normalize(x_BCHW, scale_C, shift_C) is x_BCHW


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3, dtype=torch.int64),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
    ],
)
def test_bad_images_are_named(images: Tensor) -> None:
    _, scale_C, shift_C = batch()
    with pytest.raises(UserError, match="images are"):
        normalize(images, scale_C, shift_C)
