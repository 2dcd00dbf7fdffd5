"""Masks of dropout and stochastic depth, drawn once a step for all students, so that all engines drop the
same features and branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastokd.cohort.layers import is_exactly
from fastokd.models import Student
from fastokd.models.layers import Dropout, DropPath


class DropoutMasks:
    """The layers of equal students that drop, and their masks: ``[S, B, D]`` of features; ``[S, B]``,
    true where it stays, of branches."""

    def __init__(self, students: Sequence[Student]) -> None:
        self.students = len(students)
        named = list(students[0].named_modules())
        self.sites = {
            name: module for name, module in named if is_exactly(module, Dropout) and module.p > 0
        }
        self.paths = {name: module for name, module in named if is_exactly(module, DropPath)}

    def draw(self, like: Tensor, training: bool) -> dict[str, Tensor]:
        """New masks by layer for the batch of ``like``; a feature's is 0 or 1 / (1 - p). None unless
        ``training``."""
        if not training:
            return {}
        size = (self.students, like.shape[0])
        masks = {}
        for name, site in self.sites.items():
            u_SBD = torch.rand(*size, site.width, device=like.device)
            masks[name] = (u_SBD >= site.p).to(like.dtype) / (1 - site.p)
        if self.paths:
            u_NSB = torch.rand(len(self.paths), *size, device=like.device)
            for (name, path), u_SB in zip(self.paths.items(), u_NSB.unbind(), strict=True):
                masks[name] = path.masks(u_SB)
        return masks


def give(student: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the masks of one student's layers, ``[B, D]`` or ``[B]``, for its next forward."""
    for name, mask in masks.items():
        site = student.get_submodule(name)
        if isinstance(site, DropPath):
            site.mask_B = mask
        else:
            assert isinstance(site, Dropout)
            site.mask_BD = mask
