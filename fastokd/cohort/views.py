"""What each student reads where each has a view of its own: the images, and the trunk's output.

A *view* is one augmentation of the batch. Images ``[V, B, H, W, 3]`` hold a view for each student that
runs in this process, in their order, then one for a companion that reads its own, and a last one for a frozen
teacher; ``[B, H, W, 3]`` are shared by all. In what follows a list of tensors has one for each student, or a
single one that all students read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.models import Student

T = TypeVar("T")

# How a trunk takes several views: one forward for each, with statistics of its own, or one for all.
TrunkViews = Literal["each", "all"]


def check_trunk_views(trunk_views: str) -> None:
    """Raises UserError for a word that isn't one of ``TrunkViews``."""
    if trunk_views not in get_args(TrunkViews):
        raise UserError(
            f"trunk_views is {trunk_views!r}: choose {' or '.join(get_args(TrunkViews))}"
        )


def count_views(
    images: Tensor, students: int, *, teacher: bool, companion: bool = False
) -> int | None:
    """V of ``images``; None where all networks share them.

    Raises:
        UserError: V isn't the number of networks that read a view.
    """
    if images.dim() != 5:
        return None
    wanted = students + int(companion) + int(teacher)
    if images.shape[0] != wanted:
        readers = f"{students} students" + (" and a companion" if companion else "")
        readers += " and a teacher" if teacher else ""
        raise UserError(
            f"images of shape {list(images.shape)} hold {images.shape[0]} views for {readers}: give "
            f"[{wanted}, B, ...], a view for each, or one batch [B, ...] for all"
        )
    return wanted


class TrunkOutput(NamedTuple):
    """What a trunk gives: its outputs, and its maps with each of them."""

    outputs: list[Tensor]
    maps: list[tuple[Tensor, ...]]

    @property
    def mean_BCHW(self) -> Tensor:  # noqa: N802
        """The mean of the outputs over views; a single output as it is."""
        first, *others = self.outputs
        return sum(others, first) / len(self.outputs) if others else first


def run_trunk(trunk: Student, stop: int, views: Sequence[Tensor], how: str) -> TrunkOutput:
    """The stages before ``stop`` over one or several views ``[B, 3, H, W]``.

    ``how``: with ``"each"`` a view is a forward of its own, so that batch norms normalise it by its own
    statistics and update the running ones once a view; with ``"all"`` the views are one batch.
    """
    if how == "each" or len(views) == 1:
        found = [trunk.trunk(x_BCHW, stop) for x_BCHW in views]
        return TrunkOutput([output for output, _ in found], [maps for _, maps in found])
    output, maps = trunk.trunk(torch.cat(list(views)), stop)
    by_view = [map_NCHW.chunk(len(views)) for map_NCHW in maps]
    return TrunkOutput(
        list(output.chunk(len(views))),
        [tuple(chunks[v] for chunks in by_view) for v in range(len(views))],
    )


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``scale`` (CL-ILR at the split)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.scale == 1.0 else grad * ctx.scale), None


def for_each(values: Sequence[T], students: int) -> list[T]:
    """``values`` with one entry for each student."""
    return list(values) * students if len(values) == 1 else list(values)
