"""The operations of the automatic augmentations, the strength of each, and AutoAugment's policies.

A **value** is what an operation is given: pixels of a translation, degrees of a rotation (counter-clockwise),
the tangent of a shear, the factor of brightness, colour, contrast and sharpness, the bits that are kept by
posterize, the threshold of solarize and the sum of solarize_add in grey levels, the shift of the hue in turns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
LOOKUPS = ("posterize", "solarize", "autocontrast", "equalize", "invert", "solarize_add")
# An operation's number in a row of draws.
NUMBER = {
    name: i
    for i, name in enumerate(
        ("identity", *GEOMETRIC, "vertical_flip", *BLENDS, *LOOKUPS[:-1], "hue", LOOKUPS[-1])
    )
}

# RandAugment's and TrivialAugment's, in the order of torchvision.
SPACE = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
# Those of timm's RandAugment whose effect grows with the strength (``inc1``), in its order.
TIMM_SPACE = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
# Colour jitter's, in the order of torchvision's arguments.
JITTERS = ("brightness", "contrast", "color", "hue")
# Their values are negated (of a factor: its distance to 1) with probability 1/2.
SIGNED = (*GEOMETRIC, *BLENDS)


class Reach(NamedTuple):
    """The largest value of each operation; translations in pixels, or in widths if None."""

    shear: float
    pixels: float | None
    degrees: float
    blend: float
    bits: int  # that posterize removes


# RandAugment (Cubuk et al. 2020) and AutoAugment (Cubuk et al. 2019) as in torchvision, and
# TrivialAugment's wide space (Mueller and Hutter 2021, table 2).
USUAL = Reach(0.3, None, 30.0, 0.9, 4)
WIDE = Reach(0.99, 32.0, 135.0, 0.99, 6)
WIDTHS = 150.0 / 331.0
# Strengths of RandAugment and TrivialAugment (0 to 30), and of AutoAugment (0 to 9).
BINS, POLICY_BINS = 31, 10
# The largest strength of timm's RandAugment, whose strengths are real numbers.
TIMM_MOST = 10


def values(name: str, reach: Reach, bins: int, size: tuple[int, int]) -> np.ndarray:
    """An operation's values at each strength, not negated, float64 ``[bins]``.

    ``size``: the images' height and width. The steps are float32, as torchvision's.
    """

    def steps(last: float, first: float = 0.0) -> np.ndarray:
        return torch.linspace(first, last, bins).double().numpy()

    if name.startswith("shear"):
        return steps(reach.shear)
    if name.startswith("translate"):
        along = size[name == "translate_x"]
        return steps(WIDTHS * along if reach.pixels is None else reach.pixels)
    if name == "rotate":
        return steps(reach.degrees)
    if name in BLENDS:
        return steps(reach.blend) + 1
    if name == "posterize":
        return np.round(8 - np.arange(bins) / ((bins - 1) / reach.bits))
    if name == "solarize":
        return 255 * steps(0.0, first=1.0)
    return np.zeros(bins)


def timm_values(name: str, strength_B: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A value of :data:`TIMM_SPACE` at each strength from 0 to 10, not negated, float64 ``[B]``.

    ``size``: the images' height and width. For ``solarize_add``, the levels that the dark half gains.
    """
    share_B = strength_B / TIMM_MOST
    if name.startswith("shear"):
        return share_B * 0.3
    if name.startswith("translate"):
        return share_B * 0.45 * size[name == "translate_x"]
    if name == "rotate":
        return share_B * 30
    if name in BLENDS:
        return 1 + share_B * 0.9
    if name == "posterize":
        return 4 - np.trunc(share_B * 4)
    if name == "solarize":
        return 256 - np.trunc(share_B * 256)
    if name == "solarize_add":
        return np.trunc(share_B * 110)
    return np.zeros(len(share_B))


def negated(name: str, value: np.ndarray) -> np.ndarray:
    """A signed operation's values in the other direction."""
    return 2 - value if name in BLENDS else -value


class Part(NamedTuple):
    """One of the two operations of a sub-policy."""

    name: str
    probability: float
    strength: int


def _read(table: str) -> tuple[tuple[Part, Part], ...]:
    """Sub-policies from lines ``NAME PROBABILITY STRENGTH, NAME PROBABILITY STRENGTH``."""

    def part(text: str) -> Part:
        name, probability, strength = text.split()
        return Part(name, float(probability), int(strength))

    lines = (line.split(",") for line in table.strip().splitlines())
    return tuple((part(first), part(second)) for first, second in lines)


# AutoAugment's 25 sub-policies: appendix A of the paper, tables 7 to 9. Where an operation takes no
# strength it is 0 here. Posterize and solarize count from the weakest, as torchvision does.
POLICIES = {
    "cifar10": _read("""
        invert 0.1 0, contrast 0.2 6
        rotate 0.7 2, translate_x 0.3 9
        sharpness 0.8 1, sharpness 0.9 3
        shear_y 0.5 8, translate_y 0.7 9
        autocontrast 0.5 0, equalize 0.9 0
        shear_y 0.2 7, posterize 0.3 7
        color 0.4 3, brightness 0.6 7
        sharpness 0.3 9, brightness 0.7 9
        equalize 0.6 0, equalize 0.5 0
        contrast 0.6 7, sharpness 0.6 5
        color 0.7 7, translate_x 0.5 8
        equalize 0.3 0, autocontrast 0.4 0
        translate_y 0.4 3, sharpness 0.2 6
        brightness 0.9 6, color 0.2 8
        solarize 0.5 2, invert 0.0 0
        equalize 0.2 0, autocontrast 0.6 0
        equalize 0.2 0, equalize 0.6 0
        color 0.9 9, equalize 0.6 0
        autocontrast 0.8 0, solarize 0.2 8
        brightness 0.1 3, color 0.7 0
        solarize 0.4 5, autocontrast 0.9 0
        translate_y 0.9 9, translate_y 0.7 9
        autocontrast 0.9 0, solarize 0.8 3
        equalize 0.8 0, invert 0.1 0
        translate_y 0.7 9, autocontrast 0.9 0
    """),
    "imagenet": _read("""
        posterize 0.4 8, rotate 0.6 9
        solarize 0.6 5, autocontrast 0.6 0
        equalize 0.8 0, equalize 0.6 0
        posterize 0.6 7, posterize 0.6 6
        equalize 0.4 0, solarize 0.2 4
        equalize 0.4 0, rotate 0.8 8
        solarize 0.6 3, equalize 0.6 0
        posterize 0.8 5, equalize 1.0 0
        rotate 0.2 3, solarize 0.6 8
        equalize 0.6 0, posterize 0.4 6
        rotate 0.8 8, color 0.4 0
        rotate 0.4 9, equalize 0.6 0
        equalize 0.0 0, equalize 0.8 0
        invert 0.6 0, equalize 1.0 0
        color 0.6 4, contrast 1.0 8
        rotate 0.8 8, color 1.0 2
        color 0.8 8, solarize 0.8 7
        sharpness 0.4 7, invert 0.6 0
        shear_x 0.6 5, equalize 1.0 0
        color 0.4 0, equalize 0.6 0
        equalize 0.4 0, solarize 0.2 4
        solarize 0.6 5, autocontrast 0.6 0
        invert 0.6 0, equalize 1.0 0
        color 0.6 4, contrast 1.0 8
        equalize 0.8 0, equalize 0.6 0
    """),
    "svhn": _read("""
        shear_x 0.9 4, invert 0.2 0
        shear_y 0.9 8, invert 0.7 0
        equalize 0.6 0, solarize 0.6 6
        invert 0.9 0, equalize 0.6 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, autocontrast 0.8 0
        shear_y 0.9 8, invert 0.4 0
        shear_y 0.9 5, solarize 0.2 6
        invert 0.9 0, autocontrast 0.8 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, solarize 0.3 3
        shear_y 0.8 8, invert 0.7 0
        equalize 0.9 0, translate_y 0.6 6
        invert 0.9 0, equalize 0.6 0
        contrast 0.3 3, rotate 0.8 4
        invert 0.8 0, translate_y 0.0 2
        shear_y 0.7 6, solarize 0.4 8
        invert 0.6 0, rotate 0.8 4
        shear_y 0.3 7, translate_x 0.9 3
        shear_x 0.1 6, invert 0.6 0
        solarize 0.7 2, translate_y 0.6 7
        shear_y 0.8 4, invert 0.8 0
        shear_x 0.7 9, translate_y 0.8 3
        shear_y 0.8 5, autocontrast 0.7 0
        shear_x 0.7 2, invert 0.1 0
    """),
}
