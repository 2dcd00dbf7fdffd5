"""How training images are cropped, mirrored and augmented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastokd.data.augment.spaces import JITTERS, POLICIES, SPACE, TIMM_SPACE
from fastokd.errors import UserError


@dataclass(frozen=True)
class Augment:
    """Random crop of the padded image, a horizontal flip with probability 1/2, then the operations.

    The operations come in this order: vertical flip, rotation, automatic augmentation, colour jitter, random erasing,
    cutout.

    Attributes:
        crop_padding: pixels added on every side before the crop to the original size.
        padding_mode: ``"zeros"`` (black) or ``"reflect"`` (the border pixel isn't repeated).
        flip: False if mirroring changes the class (digits).
        resized_crop: crops and resizes a random area instead, for images on disk.
        crop_scale: the smallest and largest area of a resized crop, as fractions of the image's.
        crop_ratio: the smallest and largest width / height of a resized crop.
        vertical_flip: turns half of the images upside down.
        auto_augment: ``"none"``, ``"randaugment"``, ``"timm_randaugment"``, ``"trivialaugment"``, or
            AutoAugment's policy for ``"cifar10"``, ``"imagenet"`` or ``"svhn"``.
        randaugment_ops: operations of RandAugment on an image; timm's leaves out each with probability 1/2.
        randaugment_magnitude: their strength, 0 to 30; of timm's, 0 to 10.
        randaugment_std: the standard deviation of the strength of timm's.
        color_jitter: brightness, contrast and saturation, whose factors are at most so far from 1, and
            hue, which moves by at most so many turns.
        random_erasing: the probability of a box of one colour.
        erasing_scale: the smallest and largest area of the box, as fractions of the image's.
        erasing_ratio: the smallest and largest height / width of the box.
        cutout: the side in pixels of a square of one colour around a random pixel; 0 for none.
        rotation: the largest angle of a rotation in degrees, uniform both ways; nearest pixels, black outside.
        views: the augmentation of each view by its number; none where all views have this one.
        fill: the colour of both, 0 to 255: the data set's mean. timm's RandAugment fills with it, too.
    """

    crop_padding: int = 4
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: bool = True
    resized_crop: bool = False
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    vertical_flip: bool = False
    auto_augment: str = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    randaugment_std: float = 0.5
    color_jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    random_erasing: float = 0.0
    erasing_scale: tuple[float, ...] = (0.02, 0.33)
    erasing_ratio: tuple[float, ...] = (0.3, 3.3)
    cutout: int = 0
    fill: tuple[int, ...] = (0, 0, 0)
    rotation: float = 0.0
    views: tuple[Augment, ...] = ()

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

    @property
    def timm(self) -> bool:
        """Whether operations are timm's: bilinear, filled with the mean colour, and Pillow's grey."""
        return self.auto_augment == "timm_randaugment"

    @property
    def jitters(self) -> dict[str, float]:
        """The operations of the colour jitter, by name."""
        named = zip(JITTERS, self.color_jitter, strict=True)
        return {name: most for name, most in named if most > 0}

    @property
    def stages(self) -> tuple[frozenset[str], ...]:
        """The names that each operation of an image is drawn from, one after another."""
        stages = [frozenset(["vertical_flip"])] if self.vertical_flip else []
        if self.rotation > 0:
            stages.append(frozenset(["rotate"]))
        if self.auto_augment in POLICIES:
            stages += [
                frozenset(part.name for part in parts)
                for parts in zip(*POLICIES[self.auto_augment], strict=True)
            ]
        elif self.auto_augment == "trivialaugment":
            stages.append(frozenset(SPACE))
        elif self.auto_augment != "none":
            stages += [frozenset(TIMM_SPACE if self.timm else SPACE)] * self.randaugment_ops
        return (*stages, *[frozenset(self.jitters)] * len(self.jitters))

    @property
    def operates(self) -> bool:
        """Whether there is more than crop and flip."""
        own = bool(self.stages) or self.random_erasing > 0 or self.cutout > 0
        return own or any(view.operates for view in self.views)

    def of_view(self, view: int) -> Augment:
        """The augmentation of one view."""
        return self.views[view] if self.views else self
