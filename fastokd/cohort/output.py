"""What a method gets from a cohort: its shape before training, its outputs in every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastokd.cohort.streams import Streams


@dataclass(frozen=True)
class CohortShape:
    """What a method is built from.

    ``feature_dims``: the width of each student's pooled feature. ``trunk_channels``: channels of
    the shared trunk's output, None for a network cohort. ``map_shapes``: (channels, height, width)
    of the stage maps of each student over images of the cohort's size. ``cohort``: the cohort itself, for
    a method with a companion (``companion.py``); None in a shape made by hand.
    """

    students: int
    num_classes: int
    sharing: str
    feature_dims: tuple[int, ...]
    trunk_channels: int | None
    map_shapes: tuple[tuple[tuple[int, int, int], ...], ...]
    cohort: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass
class CohortOutput:
    """One forward of a cohort.

    ``features``: a ``[B, D_s]`` for each student. ``maps``: for each student its stage maps, the
    trunk's first. ``trunk_BCHW``: the shared trunk's output, branch cohorts only; where each student has
    a view of its own, the mean over views.
    ``extra_logits_EBC``: a frozen teacher's logits, without gradient. ``own``: the students that
    ran in this process, None for all; the others have logits, features and at most the last map,
    without gradient. ``streams``: those on which the students ``own`` ran, side by side.
    ``companion_logits_EBC``: those of the method's companion, in training only.
    """

    logits_SBC: Tensor
    features: tuple[Tensor, ...]
    maps: tuple[tuple[Tensor, ...], ...]
    trunk_BCHW: Tensor | None
    extra_logits_EBC: Tensor | None
    own: range | None = None
    streams: Streams | None = None
    companion_logits_EBC: Tensor | None = None

    @property
    def features_SBD(self) -> Tensor:  # noqa: N802
        """The features as one tensor; the widths must be equal."""
        return torch.stack(self.features)
