"""Which recipes can have a view of the images for each student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

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


def check_views(
    views: str, trunk_views: str, *, sharing: str, method: str, reads_maps: bool
) -> None:
    """Raises UserError where ``method`` can't have these views, or there is no trunk to see several.

    ``reads_maps``: the method compares the students' maps.
    """
    if views == "student" and reads_maps:
        raise UserError(
            f"views is 'student', but {method} compares the students' maps place by place, which views "
            "of different crops don't share: set views to shared"
        )
    if trunk_views == "all" and sharing != "branch":
        raise UserError(
            "trunk_views is 'all', but a network form has no trunk: set trunk_views to each"
        )
    if trunk_views == "all" and views == "shared":
        raise UserError(
            "trunk_views is 'all', but the trunk sees one view: set views to student, or trunk_views to each"
        )
