"""Which recipes can have a view of the images for each student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """A view of the images for each student."""

    views: Annotated[
        Literal["shared", "student"],
        "The augmented images of a batch: `shared` by all networks, or drawn anew for each `student` (and "
        "once more for a teacher).",
    ] = "shared"
    trunk_views: Annotated[
        Literal["each", "all"],
        "Where students with views of their own share a trunk: it runs over `each` view by itself, or over "
        "`all` as one batch.",
    ] = "each"


def check_views(recipe: Any, *, reads_maps: bool) -> None:
    """Raises UserError where the recipe's method can't have its views.

    ``reads_maps``: the method compares the students' maps.
    """
    if recipe.views == "student" and reads_maps:
        raise UserError(
            f"views is 'student', but {recipe.method} compares the students' maps place by place, which "
            "views of different crops don't share: set views to shared"
        )
