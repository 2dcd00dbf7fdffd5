"""The draws of a batch's augmentation, on the host: a row of numbers for each image.

A row has the columns of each stage (:attr:`Augment.stages`), then those of each box that is filled. A stage:
the operation's number, its value, the factors of the image and of the other image in a blend, and the
matrix from a pixel to its source, both from the centre: x = xx * x + xy * y + x0, then y likewise. A
box: top, left, bottom, right, and three levels of colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.augment.settings import Augment
from fastokd.data.augment.spaces import (
    BINS,
    NUMBER,
    POLICIES,
    POLICY_BINS,
    SIGNED,
    SPACE,
    TIMM_MOST,
    TIMM_SPACE,
    USUAL,
    WIDE,
    negated,
    timm_values,
    values,
)
from fastokd.data.order import BatchOrder

STAGE, BOX = 10, 7
# As torchvision's RandomErasing.
TRIES = 10
# The operations of one stage: their numbers and their values, [B] each.
Drawn = tuple[np.ndarray, np.ndarray]


class Uniform:
    """Draws of a generator as numpy's: torch's operators on doubles would wake its threads, which then spin
    on the cores that decode."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, *shape: int) -> np.ndarray:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).numpy()

    def normal(self, count: int) -> np.ndarray:
        return torch.randn(count, generator=self.generator, dtype=torch.float64).numpy()

    def whole(self, below: int, *shape: int) -> np.ndarray:
        return torch.randint(below, shape, generator=self.generator).numpy()


def batch_rows(
    augment: Augment | None,
    order: BatchOrder,
    epoch: int,
    index: int,
    size: tuple[int, int],
    views: Sequence[int] | None = None,
) -> Tensor | None:
    """The rows of batch ``index`` of ``epoch`` on this rank, a function of (seed, epoch, batch), one view
    after another, with zeros behind a shorter row; None without operations."""
    if augment is None or not augment.operates:
        return None
    rows = []
    for view in views or (0,):
        # Drawn for the whole batch and then sliced, so that W ranks draw as one process.
        generator = order.generator(epoch, index, "operations", view=view)
        own = augment.of_view(view)
        rows.append(draw_rows(own, order.size(index), size, generator)[order.share(index)])
    most = max(one.shape[1] for one in rows)
    return torch.cat([F.pad(one, (0, most - one.shape[1])) for one in rows])


def columns_of(augment: Augment) -> int:
    """The columns of a row of its operations."""
    boxes = int(augment.random_erasing > 0) + int(augment.cutout > 0)
    return STAGE * len(augment.stages) + BOX * boxes


def draw_rows(
    augment: Augment, count: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """The rows of ``count`` images, float32 ``[B, L]``, on the CPU.

    Args:
        augment: whose operations are drawn; crop and flip aren't among them.
        size: the images' height and width.
    """
    draw = Uniform(generator)
    stages = draw_stages(augment, count, size, draw)
    parts = [columns(op_B, value_B, size, whole=not augment.timm) for op_B, value_B in stages]
    boxes = []
    if augment.random_erasing > 0:
        boxes.append(_erased(augment, count, size, draw))
    if augment.cutout > 0:
        boxes.append(_cut_out(augment.cutout, count, size, draw))
    colour_B3 = np.broadcast_to(np.array(augment.fill, dtype=np.float64), (count, 3))
    parts += [np.concatenate((box_B4, colour_B3), 1) for box_B4 in boxes]
    whole_BL = np.concatenate(parts, 1) if parts else np.zeros((count, 0))
    return torch.from_numpy(whole_BL.astype(np.float32))


def draw_stages(augment: Augment, count: int, size: tuple[int, int], draw: Uniform) -> list[Drawn]:
    """Each stage's operations."""
    stages = []
    if augment.vertical_flip:
        stages.append((NUMBER["vertical_flip"] * draw.whole(2, count), np.zeros(count)))
    if augment.rotation > 0:
        angle_B = (2 * draw(count) - 1) * augment.rotation
        stages.append((np.full(count, NUMBER["rotate"]), angle_B))
    if augment.auto_augment == "randaugment":
        for _ in range(augment.randaugment_ops):
            op_B = draw.whole(len(SPACE), count)
            at_B = np.full(count, augment.randaugment_magnitude)
            stages.append(_of_space(op_B, at_B, draw(count), size, wide=False))
    elif augment.timm:
        stages += [_of_timm(augment, count, size, draw) for _ in range(augment.randaugment_ops)]
    elif augment.auto_augment == "trivialaugment":
        op_B, at_B = draw.whole(len(SPACE), count), draw.whole(BINS, count)
        stages.append(_of_space(op_B, at_B, draw(count), size, wide=True))
    elif augment.auto_augment != "none":
        stages += _of_policy(augment.auto_augment, count, size, draw)
    if augment.jitters:
        stages += _jitter(augment.jitters, count, draw)
    return stages


def _of_space(
    op_B: np.ndarray, at_B: np.ndarray, sign_B: np.ndarray, size: tuple[int, int], *, wide: bool
) -> Drawn:
    """Operations of :data:`SPACE` at a strength each."""
    value_B = np.zeros(len(op_B))
    for number, name in enumerate(SPACE):
        which = op_B == number
        value = values(name, WIDE if wide else USUAL, BINS, size)[at_B[which]]
        value_B[which] = _signed(name, value, sign_B[which])
    return np.array([NUMBER[name] for name in SPACE])[op_B], value_B


def _of_timm(augment: Augment, count: int, size: tuple[int, int], draw: Uniform) -> Drawn:
    """One of timm's operations, or with probability 1/2 none, at a strength that is drawn, too."""
    chosen_B, (used_B, sign_B) = draw.whole(len(TIMM_SPACE), count), draw(2, count)
    strength_B = augment.randaugment_magnitude + augment.randaugment_std * draw.normal(count)
    strength_B = strength_B.clip(0, TIMM_MOST)
    op_B, value_B = np.zeros(count, dtype=np.int64), np.zeros(count)
    for number, name in enumerate(TIMM_SPACE):
        which = (chosen_B == number) & (used_B < 0.5)
        op_B[which] = NUMBER[name]
        value_B[which] = _signed(name, timm_values(name, strength_B[which], size), sign_B[which])
    return op_B, value_B


def _of_policy(policy: str, count: int, size: tuple[int, int], draw: Uniform) -> list[Drawn]:
    """The two operations of one of AutoAugment's sub-policies, each with its probability."""
    chosen_B = draw.whole(len(POLICIES[policy]), count)
    used_2B, sign_2B = draw(2, count), draw(2, count)
    stages = []
    for k in range(2):
        op_B, value_B = np.zeros(count, dtype=np.int64), np.zeros(count)
        for number, parts in enumerate(POLICIES[policy]):
            name, probability, strength = parts[k]
            which = (chosen_B == number) & (used_2B[k] < probability)
            value = values(name, USUAL, POLICY_BINS, size)[[strength]]
            op_B[which] = NUMBER[name]
            value_B[which] = _signed(name, value, sign_2B[k, which])
        stages.append((op_B, value_B))
    return stages


def _signed(name: str, value: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.where(sign < 0.5, negated(name, value), value) if name in SIGNED else value


def _jitter(jitters: dict[str, float], count: int, draw: Uniform) -> list[Drawn]:
    """Every operation of the colour jitter once, in an order of each image's own."""
    names, K = tuple(jitters), len(jitters)
    order_BK, amount_KB = draw(count, K).argsort(1), draw(K, count)
    value_KB = np.empty((K, count))
    for k, name in enumerate(names):
        least = -jitters[name] if name == "hue" else max(0.0, 1 - jitters[name])
        most = jitters[name] if name == "hue" else 1 + jitters[name]
        value_KB[k] = least + (most - least) * amount_KB[k]
    numbers_K = np.array([NUMBER[name] for name in names])
    return [(numbers_K[k_B], value_KB[k_B, np.arange(count)]) for k_B in order_BK.T]


def columns(
    op_B: np.ndarray, value_B: np.ndarray, size: tuple[int, int], *, whole: bool = True
) -> np.ndarray:
    """The columns of one stage, float64 ``[B, 10]``. ``whole``: translations are by whole pixels."""
    H, W = size
    columns_BL = np.zeros((len(op_B), STAGE))
    columns_BL[:, 0], columns_BL[:, 1] = op_B, value_B
    columns_BL[:, [2, 4, 8]] = 1  # the image itself, each pixel from its own place
    for name in ("brightness", "color", "contrast", "sharpness"):
        which = op_B == NUMBER[name]
        factor = value_B[which]
        # Sharpness is blended as image + (1 - factor) * (blurred - image).
        columns_BL[which, 2] = 1.0 if name == "sharpness" else factor
        columns_BL[which, 3] = 1 - factor
    which = op_B == NUMBER["posterize"]
    columns_BL[which, 1] = 256 - 2.0 ** (8 - value_B[which])  # the bits that stay
    # Shears keep the upper left corner, as in the papers' code: their centre isn't the image's.
    which = op_B == NUMBER["shear_x"]
    columns_BL[which, 5], columns_BL[which, 6] = value_B[which], value_B[which] * (H / 2)
    which = op_B == NUMBER["shear_y"]
    columns_BL[which, 7], columns_BL[which, 9] = value_B[which], value_B[which] * (W / 2)
    for name, column in (("translate_x", 6), ("translate_y", 9)):
        which = op_B == NUMBER[name]
        columns_BL[which, column] = -(np.trunc(value_B[which]) if whole else value_B[which])
    which = op_B == NUMBER["rotate"]
    angle = np.deg2rad(value_B[which])
    columns_BL[which, 4], columns_BL[which, 5] = np.cos(angle), -np.sin(angle)
    columns_BL[which, 7], columns_BL[which, 8] = np.sin(angle), np.cos(angle)
    return columns_BL


def _erased(augment: Augment, count: int, size: tuple[int, int], draw: Uniform) -> np.ndarray:
    """Boxes of random erasing, float64 ``[B, 4]``; of no height where nothing is erased.

    As torchvision's ``RandomErasing``: the first of ten boxes that is smaller than the image both ways, and
    none if there is none.
    """
    H, W = size
    low, high = augment.erasing_scale
    used_B, place_2B = draw(count), draw(2, count)
    area_BT, ratio_BT = draw(2, count, TRIES)
    area_BT = H * W * (low + (high - low) * area_BT)
    first, last = (math.log(ratio) for ratio in augment.erasing_ratio)
    ratio_BT = np.exp(first + (last - first) * ratio_BT)
    h_BT, w_BT = np.sqrt(area_BT * ratio_BT).round(), np.sqrt(area_BT / ratio_BT).round()
    fits_BT = (h_BT < H) & (w_BT < W)
    at_B = fits_BT.argmax(1)
    used_B = (used_B < augment.random_erasing) & fits_BT.any(1)
    h_B = np.where(used_B, h_BT[np.arange(count), at_B], 0)
    w_B = w_BT[np.arange(count), at_B]
    top_B, left_B = np.floor(place_2B[0] * (H - h_B + 1)), np.floor(place_2B[1] * (W - w_B + 1))
    return np.stack((top_B, left_B, top_B + h_B, left_B + w_B), 1)


def _cut_out(side: int, count: int, size: tuple[int, int], draw: Uniform) -> np.ndarray:
    """Squares around a random pixel, cut at the border (DeVries and Taylor 2017): float64 ``[B, 4]``."""
    H, W = size
    top_B, left_B = (draw.whole(along, count) - side // 2 for along in (H, W))
    box_B4 = np.stack((top_B, left_B, top_B + side, left_B + side), 1)
    return box_B4.clip(0).astype(np.float64)
