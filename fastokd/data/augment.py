"""How training images are cropped and mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastokd.errors import UserError


@dataclass(frozen=True)
class Augment:
    """Random crop of the padded image, then a horizontal flip with probability 1/2.

    Attributes:
        crop_padding: pixels added on every side before the crop to the original size.
        padding_mode: ``"zeros"`` (black) or ``"reflect"`` (the border pixel isn't repeated).
        flip: False if mirroring changes the class (digits).
        resized_crop: crops and resizes a random area instead, for images on disk.
    """

    crop_padding: int = 4
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: bool = True
    resized_crop: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UserError(f"crop_padding is {self.crop_padding}: it must be 0 or more")
        if self.padding_mode not in ("zeros", "reflect"):
            raise UserError(f"padding_mode is {self.padding_mode!r}: choose zeros or reflect")

    def draw_flips(self, count: int, generator: torch.Generator) -> Tensor:
        """Which of ``count`` images are mirrored, int64. Always draws, so that later draws don't
        depend on ``flip``."""
        flip_B = torch.randint(2, (count,), generator=generator)
        return flip_B if self.flip else torch.zeros_like(flip_B)
