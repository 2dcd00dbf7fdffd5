"""Which recipes can have a view of the images for each student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastokd.errors import UserError

if TYPE_CHECKING:  # it imports torch, which the names of recipes do without
    from fastokd.methods import Needs


def check_views(views: str, trunk_views: str, sharing: str, method: str, needs: Needs) -> None:
    """Raises UserError where ``method`` can't have these views, or there is no trunk to see several."""
    if views == "student" and needs.maps:
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
