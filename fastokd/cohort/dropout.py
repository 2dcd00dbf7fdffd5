"""Dropout masks, drawn once a step for all students, so that all engines drop the same features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastokd.cohort.layers import is_exactly
from fastokd.models import Student
from fastokd.models.layers import Dropout


class DropoutMasks:
    """The dropout layers of equal students, and their masks ``[S, B, D]``."""

    def __init__(self, students: Sequence[Student]) -> None:
        self.students = len(students)
        self.sites = {
            name: module
            for name, module in students[0].named_modules()
            if is_exactly(module, Dropout) and module.p > 0
        }

    def draw(self, like: Tensor, training: bool) -> dict[str, Tensor]:
        """New masks by layer for the batch of ``like``, with entries 0 or 1 / (1 - p); none unless
        ``training``."""
        if not training:
            return {}
        size = (self.students, like.shape[0])
        masks = {}
        for name, site in self.sites.items():
            u_SBD = torch.rand(*size, site.width, device=like.device)
            masks[name] = (u_SBD >= site.p).to(like.dtype) / (1 - site.p)
        return masks


def give(student: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the masks ``[B, D]`` of the dropout layers of ``student`` for the next forward."""
    for name, mask_BD in masks.items():
        site = student.get_submodule(name)
        assert isinstance(site, Dropout)
        site.mask_BD = mask_BD
