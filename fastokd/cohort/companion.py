"""Networks that run beside a cohort's students in training: a mean model, a hybrid.

A companion is a submodule of its method, so checkpoints, restored steps and ``.to()`` include it. Its
parameters require no gradient. It attaches itself to the cohort of the shape that the method is built from
(``create_method(name, cohort.shape)``), which then runs it in every forward in training mode, until another
method is built from its shape:

    companion.refresh(cohort)         before the students, once a step
    out.companion_logits_EBC = ...    after the students, on the same images or on a view of its own

In eval mode it doesn't run; ``companion.networks`` is a cohort that can be called alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort.output import CohortOutput
from fastokd.errors import UserError


class Companion(nn.Module):
    """The base of companions.

    Args:
        cohort: the :class:`~fastokd.cohort.Cohort` that runs it.
        students: the number of its networks, each a network of the cohort's kind.
        own_view: where there is a view for each student, it reads one of its own, after the students'.

    Attributes:
        networks: its networks, a cohort with the names of states that a cohort has.
        refreshed_apart: a compiled forward leaves :meth:`refresh` to its caller.
        due: 1 where the next forward calls :meth:`renew`: at the start, and as the method sets it.
    """

    due: Tensor

    def __init__(self, cohort: Any, students: int, *, own_view: bool = False) -> None:
        super().__init__()
        self.own_view = own_view
        self.refreshed_apart = False
        self.networks = cohort.like(students)
        self.networks.requires_grad_(False)
        self.register_buffer("due", torch.ones(()))
        cohort.accompany(self)

    def renew(self, cohort: Any) -> Iterator[tuple[list[Tensor], ...]]:
        """Pairs of tensors to write and their values, of one dtype, from the students' before the step."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh(self, cohort: Any) -> None:
        """Writes what :meth:`renew` gives if that is due. Parts of an accumulated batch do it once.

        The condition is a tensor, so that a CUDA graph sees it change: x <- (1 - due) x + due value.
        """
        for written, values in self.renew(cohort):
            due = self.due.to(written[0].dtype)
            torch._foreach_mul_(written, 1 - due)
            torch._foreach_add_(written, torch._foreach_mul(values, due))
        for ours, theirs in counts(self.networks, cohort):
            ours.copy_(torch.where(self.due != 0, theirs, ours))
        self.due.zero_()

    def forward(self, cohort: Any, images: Tensor) -> Tensor:
        """The logits ``[E, B, C]`` of its networks over normalised images, ``[V, B, 3, H, W]`` with a view
        for each of them, or ``[B, 3, H, W]``."""
        del cohort
        with torch.no_grad():
            logits_EBC: Tensor = self.networks(images).logits_SBC
        return logits_EBC


def companion_logits(out: CohortOutput, method: str) -> Tensor:
    """``out.companion_logits_EBC`` in the dtype of the students' logits; raises where there are none."""
    if out.companion_logits_EBC is None:
        raise UserError(
            f"the cohort's output has no logits of {method}'s companion: create {method} from cohort.shape "
            "before the forward, and no other method after it, in training mode"
        )
    return out.companion_logits_EBC.to(out.logits_SBC.dtype)


def counts(networks: nn.Module, cohort: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries that aren't floating point, such as the batches that a norm has seen, in both."""
    theirs = cohort.state_dict()
    for name, value in networks.state_dict().items():
        if not value.is_floating_point():
            yield value, theirs[name]


def floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point entries."""
    return {name: value.detach() for name, value in state.items() if value.is_floating_point()}


def by_dtype(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Lists of as many tensors, divided by the dtype of the first one's; a tied tensor, which has several
    names, is there once."""
    place = {(x.untyped_storage()._cdata, x.storage_offset()): i for i, x in enumerate(lists[0])}
    lists = tuple([one[i] for i in place.values()] for one in lists)
    for dtype in dict.fromkeys(x.dtype for x in lists[0]):
        at = [i for i, x in enumerate(lists[0]) if x.dtype == dtype]
        yield tuple([one[i] for i in at] for one in lists)
