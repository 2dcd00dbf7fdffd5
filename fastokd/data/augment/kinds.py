"""Views of several kinds: what each changes in a recipe's augmentation (OKDPH's published views)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastokd.data.augment.settings import Augment

# OKDPH's rotation; its cutout is half of CIFAR's side, at a random pixel, black.
DEGREES = 15.0


def with_kinds(augment: Augment, kinds: Sequence[str], size: int) -> Augment:
    """``augment`` with a view of each kind: ``plain``, ``rotation``, ``cutout``, ``randaugment`` and
    ``autoaugment`` (ImageNet's policy), which aren't mirrored, or ``none``. ``size``: of the images."""
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "rotation": {"rotation": DEGREES},
        "cutout": {"cutout": size // 2, "fill": (0, 0, 0)},
        "randaugment": {
            "auto_augment": "randaugment",
            "randaugment_ops": 2,
            "randaugment_magnitude": 9,
            "flip": False,
        },
        "autoaugment": {"auto_augment": "imagenet", "flip": False},
        "none": {"crop_padding": 0, "flip": False},
    }
    return replace(augment, views=tuple(replace(augment, **changes[kind]) for kind in kinds))
