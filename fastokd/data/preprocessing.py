"""The preprocessing of pictures: from a file to the network's input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.decode import ImageBytes, centre, grey_square, read_rgb
from fastokd.data.views import BACKGROUND, View
from fastokd.known import MOST_PIXELS
from fastokd.ops.normalize import normalize, scale_and_shift

# Tolerance for mean and deviation: held-out images and the decoder change a folder's by less.
NEAR = 0.01


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    A picture is rotated by its EXIF orientation, and transparent pixels are filled with
    ``background``. The shorter side is resized to ``eval_resize`` by antialiased bilinear
    interpolation and the centre of ``input_size`` is cropped, in one resampling.

    A set of small grey pictures has a ``native_size``. The centre square of a picture is resized to it
    and quantised to ``levels`` of grey, then enlarged to ``input_size`` by bicubic interpolation or
    padded with a black ``border``. A picture of exactly ``input_size`` isn't resized.

    Attributes:
        input_size: height and width in pixels.
        mean, std: of the channels, for images in [0, 1].
        eval_resize: the shorter side before the centre crop; 0 for ``input_size``.
        native_size: height and width of the set's own pictures; 0 if they have any size.
        border: the native picture is padded with black instead of enlarged.
        grey: the three channels are the picture's luma.
        levels: the number of grey levels of the set's own pictures.
        background: the level of all channels under transparent pixels, 0 to 255.
    """

    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_resize: int = 0
    native_size: int = 0
    border: bool = False
    grey: bool = False
    levels: int = 256
    background: int = BACKGROUND

    @property
    def view(self) -> View:
        """The geometric part: sizes and background."""
        return View(self.input_size, self.eval_resize, self.background)

    @property
    def interpolation(self) -> str:
        """The interpolation to ``input_size``, by name."""
        return "bicubic" if self.native_size and not self.border else "bilinear"

    def read(self, path: Path | ImageBytes) -> np.ndarray:
        """One picture as uint8 ``[input_size, input_size, 3]``.

        Raises:
            UserError: it can't be read as a picture.
        """
        image = read_rgb(path, self.background)
        if self.native_size and min(image.size) != self.input_size:
            grey_HW = np.asarray(grey_square(image, self.native_size))
            steps_HW = np.round(grey_HW * ((self.levels - 1) / 255))
            return self.from_native(torch.from_numpy(steps_HW)[None])[0].numpy()
        if self.grey:
            image = image.convert("L").convert("RGB")
        return centre(image, self.view)

    def from_native(self, steps_NHW: Tensor) -> Tensor:
        """The set's own pictures, of levels 0 to ``levels`` - 1, as uint8 ``[N, S, S, 3]``."""
        scale = 255 / (self.levels - 1)
        if self.border:
            margin = self.input_size - self.native_size
            grey_NHW = (steps_NHW * scale).round().to(torch.uint8)
            shown_NHW = F.pad(grey_NHW, (margin // 2, margin - margin // 2) * 2)
        else:
            size = (self.input_size, self.input_size)
            grey_N1HW = (steps_NHW.float() * scale)[:, None]
            large_N1HW = F.interpolate(grey_N1HW, size=size, mode="bicubic", align_corners=False)
            # Bicubic overshoots at the edges of a stroke, hence the clamp.
            shown_NHW = large_N1HW[:, 0].round().clamp(0, 255).to(torch.uint8)
        return shown_NHW[..., None].expand(-1, -1, -1, 3).contiguous()

    def normalized(self, images_BHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalises uint8 images as the cohort does, to ``[B, 3, H, W]`` in ``dtype``."""
        scale_C, shift_C = scale_and_shift(self.mean, self.std, dtype)
        here = images_BHWC.device
        return normalize(images_BHWC, scale_C.to(here), shift_C.to(here), dtype).contiguous()

    def differences(self, other: Preprocessing, near: float = NEAR) -> list[str]:
        """The names of fields that differ; mean and deviation by more than ``near``."""
        return [
            known.name
            for known in dataclasses.fields(self)
            if not _same(getattr(self, known.name), getattr(other, known.name), near)
        ]

    def to_facts(self) -> dict[str, str]:
        """The fields as JSON values, for a student's file."""
        return {name: json.dumps(value) for name, value in dataclasses.asdict(self).items()}

    def sentence(self) -> str:
        """The preprocessing in words."""
        size = f"{self.input_size} x {self.input_size}"
        if self.native_size:
            way = "padded with black" if self.border else "enlarged by bicubic interpolation"
            shown = (
                f"The centre square is converted to grey, resized to {self.native_size} x "
                f"{self.native_size} and {way} to {size}; one of {size} isn't resized."
            )
        else:
            shown = (
                f"The shorter side is resized to {self.view.resize} by antialiased bilinear "
                f"interpolation, and the centre {size} is taken."
            )
        ground = {0: "black", 255: "white"}.get(self.background, f"grey {self.background}")
        return (
            f"A picture is rotated by its EXIF orientation, and transparent pixels are filled with "
            f"{ground}. {shown}"
        )


# Defaults of each set; the mean and the deviation of a folder are measured.
_CIFAR = Preprocessing(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
KNOWN: dict[str, Preprocessing] = {
    "cifar10": _CIFAR,
    "cifar100": dataclasses.replace(
        _CIFAR, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    # Mean and deviation of the 500 preprocessed training images; a test checks them.
    "digits": Preprocessing(
        32, (0.3101,) * 3, (0.3542,) * 3, native_size=8, grey=True, levels=17, background=0
    ),
    # Mean and deviation of the 60,000 preprocessed training images, black border included.
    "fashion_mnist": Preprocessing(
        32, (0.2190,) * 3, (0.3318,) * 3, native_size=28, border=True, grey=True, background=0
    ),
    # Mean and deviation of the training fonts of Debian 12's texlive-fonts-extra.
    "glyphs": Preprocessing(
        32, (0.0821,) * 3, (0.2524,) * 3, native_size=32, grey=True, background=0
    ),
    # Mean and deviation of the 73,257 training images, the usual values.
    "svhn": Preprocessing(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    # Of the 5,000 labelled training images, the usual values.
    "stl10": Preprocessing(96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    # Of the 100,000 training images, the usual values.
    "tiny_imagenet": Preprocessing(64, (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)),
    # The usual values, as in torchvision.
    "imagenet": Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), eval_resize=256),
    "imagefolder": Preprocessing(32, (0.5,) * 3, (0.25,) * 3),
}


def preprocessing_of(
    dataset: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    eval_resize: int | None = None,
) -> Preprocessing:
    """A data set's preprocessing, with the given values replaced. An unknown set has a folder's."""
    usual = KNOWN.get(dataset, KNOWN["imagefolder"])
    return dataclasses.replace(
        usual,
        mean=usual.mean if mean is None else tuple(mean),
        std=usual.std if std is None else tuple(std),
        input_size=usual.input_size if image_size is None else image_size,
        eval_resize=usual.eval_resize if eval_resize is None else eval_resize,
    )


# Files are untrusted: the check that each value must pass.
FITS: dict[str, Callable[[Any], bool]] = {
    "mean": lambda value: _numbers(value),
    "std": lambda value: _numbers(value) and min(value) > 0,
    "input_size": lambda value: _whole(value, 1, MOST_PIXELS),
    "eval_resize": lambda value: _whole(value, 0, MOST_PIXELS),
    "native_size": lambda value: _whole(value, 0, MOST_PIXELS),
    "border": lambda value: isinstance(value, bool),
    "grey": lambda value: isinstance(value, bool),
    "levels": lambda value: _whole(value, 2, 256),
    "background": lambda value: _whole(value, 0, 255),
}


def from_facts(said: Mapping[str, Any], fact: Callable[[str], Any]) -> Preprocessing:
    """The preprocessing in a student's metadata.

    Files of earlier versions have only ``mean``, ``std``, ``input_size`` and ``eval_resize``. The
    other fields are those of the data set with this mean and deviation, or a folder's.

    Args:
        said: the metadata.
        fact: returns a checked value by name, or raises.
    """
    if "mean" not in said:
        fact("input_size")  # if both are missing, the message names input_size
    mean, std = tuple(fact("mean")), tuple(fact("std"))
    same = (p for p in KNOWN.values() if _same(p.mean, mean) and _same(p.std, std))
    usual = next(same, None)
    # If the data set is unknown, the file must have a size.
    values = {} if usual else {"input_size": fact("input_size")}
    values |= {name: fact(name) for name in FITS if name in said}
    base = usual or KNOWN["imagefolder"]
    return dataclasses.replace(base, **{**values, "mean": mean, "std": std})


def _same(a: Any, b: Any, apart: float = 1e-6) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(abs(x - y) < apart for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _numbers(value: Any) -> bool:
    """Three finite numbers, one a channel."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
    )


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
