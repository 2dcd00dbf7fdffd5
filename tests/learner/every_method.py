"""Methods in every sharing that it has, at its smallest; and what stands for a CUDA graph."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.methods import MethodLoss, list_methods, method_class
from fastokd.recipe.names import Recipe, recipe

COMPILES = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile on a CPU needs Python.h (python3-dev)",
)
# Of the ablations the one that draws: the others are its class with other scores.
METHODS = [
    (method, sharing)
    for method in list_methods()
    if method not in ("okddip_entropy", "okddip_mean", "okddip_symmetric")
    for sharing in method_class(method).needs.sharing
]
# What a sharing changes is the cohort's code, the same for every method: both only for a reader of
# features, of maps and of logits.
READERS = ("okddip", "ffsd", "kdcl")
ONCE = [
    (method, sharing)
    for method, sharing in METHODS
    if method in READERS or sharing == method_class(method).needs.sharing[-1]
]


def small(method: str, sharing: str, **changes: Any) -> Recipe:
    """``method`` over three ResNet-8 and drawn or real digits."""
    changes = {"students": 3, "batch_size": 6, "epochs": 300, **changes}
    if method_class(method).needs.teacher:
        changes = {"teacher": "baseline/resnet8/digits", **changes}
    for name in (f"{method}-{sharing}/resnet8/digits", f"{method}/resnet8/digits"):
        try:
            made = recipe(name, **changes)
        except UserError:
            continue
        if made.sharing == sharing:
            return made
    return recipe(f"{method}/resnet8/digits", **{**changes, "sharing": sharing})


class Recorder:
    """Stands for CUDA graphs: ``body`` runs in replays alone, which fill the first one's tensors."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        place = len(self.replays)
        self.replays.append(0)
        logits_SBC, total = torch.empty(0), torch.empty(())
        parts: dict[str, Tensor] = {}

        def replay() -> None:
            new_SBC, loss = body()
            assert not new_SBC.requires_grad
            assert not loss.total.requires_grad
            logits_SBC.resize_(new_SBC.shape).copy_(new_SBC)
            total.copy_(loss.total)
            for name, value in loss.parts.items():
                parts.setdefault(name, torch.empty_like(value)).copy_(value)
            self.replays[place] += 1

        return (logits_SBC, MethodLoss(total, parts)), replay
