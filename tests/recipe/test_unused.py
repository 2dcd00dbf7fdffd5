"""Every setting that needs another one is refused without it, and taken with it."""

from __future__ import annotations

from typing import Any

import pytest

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.unused import NEEDS

DISK = {"resized_crop": True, "crop_padding": 0, "image_size": 64}
# A value other than the default of each setting, and what it needs.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "train_size": (32, DISK),
    "first_size": (32, {**DISK, "size_epochs": [1, 2]}),
    "size_epochs": ([1, 2], {**DISK, "first_size": 32}),
    "crop_scale": ([0.5, 1.0], DISK),
    "crop_ratio": ([1.0, 1.0], DISK),
    "randaugment_ops": (3, {"auto_augment": "randaugment"}),
    "randaugment_magnitude": (5, {"auto_augment": "timm_randaugment"}),
    "randaugment_std": (1.0, {"auto_augment": "timm_randaugment"}),
    "erasing_scale": ([0.1, 0.2], {"random_erasing": 0.5}),
    "erasing_ratio": ([1.0, 1.0], {"random_erasing": 0.5}),
    "target_threshold": (0.2, {"criterion": "bce"}),
    "mix_prob": (0.5, {"mixup": 0.2}),
    "mix_switch_prob": (0.2, {"mixup": 0.2, "cutmix": 1.0}),
    "mix_epochs": (2, {"cutmix": 1.0}),
    "mix_each": (True, {"mixup": 0.2}),
    "ema_warmup": (False, {"ema": 0.9}),
    "average_start": (1, {"swa": True}),
    "average_every": (2, {"ema": 0.9}),
    "average_students": ("all", {"ema": 0.9}),
    "average_norms": ("recomputed", {"swa": True}),
    "keep": ("raw", {"ema": 0.9}),
    "trunk_views": ("all", {"views": "student"}),
    "view_kinds": ("plain+cutout", {"views": "student"}),
    "final_lr": (1e-3, {"schedule": "cosine"}),
    "warmup_lr": (1e-3, {"warmup": "over", "warmup_epochs": 2}),
    "frozen_stages": (1, {"frozen_epochs": 2}),
    "frozen_epochs": (2, {"frozen_stages": 1}),
}


def made(**changes: Any) -> Any:
    return recipe(
        "okddip-branch@2/resnet8/imagefolder", **{"epochs": 9, "image_size": 32, **changes}
    )


def test_each_setting_of_the_table_has_a_case() -> None:
    assert CASES.keys() == {name for need in NEEDS for name in need.names}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_without_what_it_needs(name: str) -> None:
    value, needed = CASES[name]
    assert getattr(made(**needed, **{name: value}), name) != getattr(made(), name)
    first = rf"^{name} is .*, but .*: .*set {name} to "
    with pytest.raises(UserError, match=first):
        made(**{name: value})
