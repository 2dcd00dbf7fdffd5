"""Which recipes can have a view of the images for each student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import Bound

# What a view of each kind adds to the recipe's augmentation, or leaves out (data/augment/kinds.py).
KINDS = ("plain", "rotation", "cutout", "randaugment", "autoaugment", "none")
WORDS = Bound(
    lambda value: not value or {*value.split("+")} <= {*KINDS},
    f"words of {', '.join(KINDS)} joined by +, one for each view",
)


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """A view of the images for each student."""

    views: Annotated[
        Literal["shared", "student"],
        "The augmented images of a batch: `shared` by all networks, or drawn anew for each `student` (and "
        "once more for a hybrid and for a teacher).",
    ] = "shared"
    trunk_views: Annotated[
        Literal["each", "all"],
        "Where students with views of their own share a trunk: it runs over `each` view by itself, or over "
        "`all` as one batch.",
    ] = "each"
    view_kinds: Annotated[
        str,
        "Views of images in memory with augmentations of their own, a word each joined by `+`: `plain` as "
        "the recipe says, with a `rotation` of up to 15 degrees, a black `cutout` of half the side, "
        "`randaugment` and `autoaugment` without flips, or `none` at all.",
        WORDS,
    ] = ""


def check_views(recipe: Any, *, reads_maps: bool) -> None:
    """Raises UserError where the recipe's method can't have its views.

    ``reads_maps``: the method compares the students' maps.
    """
    if recipe.views == "student" and reads_maps:
        raise UserError(
            f"views is 'student', but {recipe.method} compares the students' maps place by place, which "
            "views of different crops don't share: set views to shared"
        )
    if not recipe.view_kinds:
        return
    words = recipe.view_kinds.split("+")
    if recipe.number_of_views != len(words):
        raise UserError(
            f"view_kinds is {recipe.view_kinds!r}, {len(words)} words for {recipe.number_of_views or 1} "
            "views: give one for each, or set it to ''"
        )
    if recipe.resized_crop:
        raise UserError(
            f"view_kinds is {recipe.view_kinds!r}, but images that are streamed have one kind of view: set "
            "it to ''"
        )
