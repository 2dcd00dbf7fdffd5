"""The crops of images on disk: random for training, the centre for evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastokd.errors import UserError

# torchvision's RandomResizedCrop at its defaults: areas as fractions of the image's, and width / height.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
# White, under transparent pixels.
BACKGROUND = 255


@dataclass(frozen=True)
class View:
    """The output size of images on disk.

    Attributes:
        image_size: height and width.
        eval_resize: the shorter side before the centre crop in evaluation; 0 for ``image_size``.
        background: level of all channels under transparent pixels, 0 to 255.
    """

    image_size: int = 224
    eval_resize: int = 0
    background: int = BACKGROUND

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}: it must be at least 1")
        if self.eval_resize and self.eval_resize < self.image_size:
            raise UserError(
                f"eval_resize is {self.eval_resize}, which is less than image_size "
                f"{self.image_size}: choose at least that, or 0"
            )

    @property
    def resize(self) -> int:
        """The shorter side before the centre crop."""
        return self.eval_resize or self.image_size


class Windows(NamedTuple):
    """For each image of a batch, the window to decode (whole pixels) and the region of interest within
    it that becomes the output (fractions of a pixel). Rows are (top, left) or (height, width)."""

    start_B2: np.ndarray
    shape_B2: np.ndarray
    roi_start_B2: np.ndarray
    roi_end_B2: np.ndarray


def random_boxes(
    sizes_B2: Tensor,
    generator: torch.Generator,
    scale: Sequence[float] = AREA,
    ratio: Sequence[float] = RATIO,
) -> Tensor:
    """Boxes (top, left, height, width), int64 ``[B, 4]``, as ``RandomResizedCrop`` draws them.

    Ten areas (of ``scale``) and ratios (of ``ratio``) are drawn. The first box that fits is placed
    uniformly; if none fits, the box is the largest centred one of a permitted ratio.
    """
    B = len(sizes_B2)
    area_BT, ratio_BT = torch.rand(2, B, TRIES, generator=generator, dtype=torch.float64).numpy()
    place_2B = torch.rand(2, B, generator=generator, dtype=torch.float64).numpy()
    # In numpy: torch's exp and sqrt of doubles wake its threads even for one batch's boxes, and these
    # spin on the cores that decode.
    height_B, width_B = sizes_B2.numpy().astype(np.float64).T
    area_BT = (scale[0] + (scale[1] - scale[0]) * area_BT) * (height_B * width_B)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BT = np.exp(low + (high - low) * ratio_BT)
    w_BT, h_BT = np.sqrt(area_BT * ratio_BT).round(), np.sqrt(area_BT / ratio_BT).round()
    fits_BT = (w_BT > 0) & (w_BT <= width_B[:, None]) & (h_BT > 0) & (h_BT <= height_B[:, None])
    first_B = fits_BT.argmax(1)
    w_B, h_B = w_BT[np.arange(B), first_B], h_BT[np.arange(B), first_B]
    top_B, left_B = place_2B[0] * (height_B - h_B + 1), place_2B[1] * (width_B - w_B + 1)
    drawn_B4 = np.stack((np.floor(top_B), np.floor(left_B), h_B, w_B), 1)
    box_B4 = np.where(fits_BT.any(1, keepdims=True), drawn_B4, _widest(height_B, width_B, ratio))
    return torch.from_numpy(box_B4.astype(np.int64))


def _widest(height_B: np.ndarray, width_B: np.ndarray, ratio: Sequence[float]) -> np.ndarray:
    """The largest centred box of a permitted ratio, at least a pixel high and wide."""
    low, high = ratio
    ratio_B = width_B / height_B
    w_B = np.where(ratio_B > high, (height_B * high).round().clip(1), width_B)
    h_B = np.where(ratio_B < low, (width_B / low).round().clip(1), height_B)
    return np.stack(((height_B - h_B) // 2, (width_B - w_B) // 2, h_B, w_B), 1)


def windows_of_boxes(box_B4: Tensor) -> Windows:
    """Windows of which all becomes the output."""
    box = box_B4.numpy()
    shape_B2 = box[:, 2:].astype(np.int32)
    end_B2 = shape_B2.astype(np.float32)
    return Windows(box[:, :2].astype(np.int32), shape_B2, np.zeros_like(end_B2), end_B2)


def mirrored(windows: Windows, flip_B: Tensor) -> Windows:
    """The windows, mirrored where ``flip_B``: the region of interest then begins at its right edge."""
    flip_B2 = flip_B.numpy()[:, None].astype(bool) & np.array([False, True])
    start_B2, end_B2 = windows.roi_start_B2, windows.roi_end_B2
    return windows._replace(
        roi_start_B2=np.where(flip_B2, end_B2, start_B2),
        roi_end_B2=np.where(flip_B2, start_B2, end_B2),
    )


def resized_sizes(sizes_B2: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The images' sizes after a resize of the shorter side to ``view.resize``, and the corners of the
    centre crops within, int64 ``[B, 2]``; rounded as torchvision's ``Resize`` and ``CenterCrop``."""
    short_B1 = sizes_B2.min(1, keepdims=True)
    resized_B2 = np.where(sizes_B2 == short_B1, view.resize, view.resize * sizes_B2 // short_B1)
    return resized_B2, np.round((resized_B2 - view.image_size) / 2).astype(np.int64)


def centre_boxes(sizes_B2: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The part of each image that becomes the output, as two corners ``[B, 2]`` (row, column).

    This is the centre of ``image_size`` after a resize of the shorter side
    (:func:`resized_sizes`).
    """
    resized_B2, corner_B2 = resized_sizes(sizes_B2, view)
    scale_B2 = sizes_B2 / resized_B2
    from_B2 = corner_B2 * scale_B2
    return from_B2, from_B2 + view.image_size * scale_B2


def centre_windows(sizes_B2: Tensor, view: View) -> Windows:
    """:func:`centre_boxes` as one resampling; only the pixels that its filter reads are decoded."""
    sizes = sizes_B2.numpy().astype(np.int64)
    from_B2, to_B2 = centre_boxes(sizes, view)
    # A triangular filter reaches one step of the resampling, and at least a pixel.
    reach_B2 = np.maximum((to_B2 - from_B2) / view.image_size, 1) + 1
    start_B2 = np.clip(np.floor(from_B2 - reach_B2), 0, None)
    stop_B2 = np.minimum(np.ceil(to_B2 + reach_B2), sizes)
    return Windows(
        start_B2.astype(np.int32),
        (stop_B2 - start_B2).astype(np.int32),
        (from_B2 - start_B2).astype(np.float32),
        (to_B2 - start_B2).astype(np.float32),
    )
