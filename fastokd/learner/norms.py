"""The norms' running statistics: which entries of a state they are, and recomputed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastokd.cohort import Cohort
from fastokd.distributed.ranks import Ranks

# The batches that statistics are computed over, as fvcore's `update_bn_stats`.
BATCHES = 200
ENTRIES = ("running_mean", "running_var", "num_batches_tracked")


def norms_of(*modules: nn.Module) -> list[_NormBase]:
    """The norms that have running statistics."""
    found = (norm for module in modules for norm in module.modules())
    return [n for n in found if isinstance(n, _NormBase) and n.running_mean is not None]


def statistics_of(cohort: Cohort, student: int) -> set[str]:
    """The plain keys of a student's running statistics, the trunk's included."""
    parts = [cohort.students[student], *([] if cohort.trunk is None else [cohort.trunk])]
    return {
        f"{path}.{entry}"
        for part in parts
        for path, norm in part.named_modules()
        if isinstance(norm, _NormBase) and norm.running_mean is not None
        for entry in ENTRIES
    }


@torch.no_grad()
def recompute(
    cohort: Cohort,
    batches: Iterable[Tensor],
    context: Callable[[], AbstractContextManager[Any]],
    ranks: Ranks,
) -> None:
    """Sets the running statistics to their mean over ``batches`` of images: of each batch's mean and
    unbiased variance, as ``torch.optim.swa_utils.update_bn``. All other layers stay in eval mode, so
    that nothing is dropped and no random number is drawn; norms of frozen stages keep their statistics.
    Ranks that share a batch average their results.
    """
    cohort.train()
    norms = [norm for norm in norms_of(cohort) if norm.training]
    cohort.eval()
    with _cumulative(norms):
        for images_BHWC in batches:
            with context():
                cohort(images_BHWC)
    if ranks.size > 1:
        own = [x for n in norms for x in (n.running_mean, n.running_var) if x is not None]
        everyone = ranks.gather((ranks.students.rank, [value.cpu() for value in own]))
        # Where the students have views, only the ranks of the first column see the first one.
        first = [theirs for column, theirs in everyone if column == 0]
        for value, found in zip(own, zip(*first, strict=True), strict=True):
            value.copy_(torch.stack(found).mean(0))


@contextmanager
def _cumulative(norms: list[_NormBase]) -> Iterator[None]:
    """Within it the norms train, from nothing, with equal weights for all batches."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
