"""What a recipe may say of its teacher, and of the mean and deviation of pretrained students."""

from __future__ import annotations

from typing import Any

from fastokd.errors import UserError

# Settings that change the images of a batch at random, and those that mix two of its images.
AUGMENTS = (
    *("crop_padding", "resized_crop", "flip", "vertical_flip", "auto_augment", "color_jitter"),
    *("random_erasing", "cutout"),
)
MIXES = ("mixup", "cutmix")


def check_teaching(recipe: Any, *, has_teacher: bool) -> None:
    """Raises UserError where cached logits of a teacher wouldn't be those of the images that it sees, or
    a student has no published normalisation.

    ``has_teacher``: the recipe's method has one.
    """
    for name in recipe.models if recipe.normalise_by == "model" else ():
        if ":" not in name:
            raise UserError(
                f"normalise_by is 'model', but {name} is no network of torchvision or timm, which would "
                "state its mean and deviation: set it to data"
            )
    how = recipe.cache_teacher
    if how == "no":
        return
    if not has_teacher:
        raise UserError(
            f"cache_teacher is {how!r}, but {recipe.method} has no teacher: leave it out"
        )
    for name in MIXES:
        if _is_on(recipe, name):
            raise UserError(
                f"cache_teacher is {how!r}, but {name} is {getattr(recipe, name)}, and the logits of an "
                f"image aren't those of a mixture: set one of them to 0 or no"
            )
    for name in AUGMENTS:
        if how == "exact" and _is_on(recipe, name):
            raise UserError(
                f"cache_teacher is 'exact', but {name} is {getattr(recipe, name)}, so that every epoch "
                "has other images: choose 'plain', whose teacher sees them without augmentation, or "
                "'no'"
            )


def _is_on(recipe: Any, name: str) -> bool:
    value = getattr(recipe, name, 0)
    return any(value) if isinstance(value, tuple) else value not in (0, "none")
