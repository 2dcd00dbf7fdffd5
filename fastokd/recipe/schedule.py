"""Learning rates: a schedule and its warm-up, by epoch or by step.

Time is counted in updates of the rate: ``n`` of them are done, and there are ``per_epoch`` in an epoch
(one where the rate changes by epoch). E, W: the recipe's epochs and warm-up in the same unit.

========== ===================================================================================
schedule   rate after n updates, without a warm-up
========== ===================================================================================
step       ``lr * lr_decay ** (milestones reached)``
cosine     ``final + (lr - final) (1 + cos(pi n / E)) / 2`` (SGDR, arXiv:1608.03983, section 3)
linear     ``lr + (final - lr) n / E``
one_cycle  cosine, whose warm-up is a cosine too (torch's OneCycleLR): the peak is update W - 1 and
           the final rate is that of the last update, E - 1
constant   ``lr``
========== ===================================================================================

Warm-ups, while ``n < W``:

- ``scaled`` (FFSD): the schedule's rate times ``(n + 1) / W``.
- ``over`` (timm): from ``warmup_lr`` to ``lr`` in a line, in place of the schedule's first W updates.
- ``before`` (timm's ``warmup_prefix``, torchvision's references, FFCV's peak): the same line, and the
  schedule then takes the remaining ``E - W`` updates.

A warm-up of less than an update is left out: a short run of a recipe with one by epoch would else have
``warmup_lr`` for its whole first epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import NOT_NEGATIVE

Schedule = Literal["step", "cosine", "linear", "one_cycle", "constant"]
WarmUp = Literal["scaled", "over", "before"]
# Those that end at `final_lr`, after exactly the recipe's epochs.
ENDING = ("cosine", "linear", "one_cycle")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate changes."""

    schedule: Annotated[
        Schedule,
        "How the learning rate falls: `step` (at the milestones), `cosine`, `linear`, `one_cycle` or "
        "`constant`.",
    ] = "step"
    schedule_by: Annotated[
        Literal["epoch", "step"], "When the rate changes: each `epoch` or each `step`."
    ] = "epoch"
    final_lr: Annotated[
        float, "The rate at which cosine, linear and one_cycle end.", NOT_NEGATIVE
    ] = 0.0
    warmup: Annotated[
        WarmUp,
        "The warm-up's form: `scaled` (the schedule's rate times epoch / warmup_epochs), `over` (a line "
        "from warmup_lr to lr over the schedule's beginning) or `before` (the same line before it).",
    ] = "scaled"
    warmup_lr: Annotated[
        float, "The first rate of a warm-up `over` or `before`, and of one_cycle.", NOT_NEGATIVE
    ] = 0.0


def rate(recipe: Any, n: int, per_epoch: int, *, warm_up: bool = True) -> float:
    """The learning rate after ``n`` updates of it, of which an epoch has ``per_epoch``.

    ``warm_up=False``: that of parameters which the warm-up leaves out. They follow the schedule, which
    stays at its first rate where it begins after the warm-up.
    """
    warmup = recipe.warmup_epochs * per_epoch
    if recipe.schedule == "one_cycle":
        return _one_cycle(recipe, n, per_epoch, warmup, warm_up=warm_up)
    apart = recipe.warmup == "before"
    if warm_up and recipe.warmup != "scaled" and n < warmup and warmup >= 1:
        return float(recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * n / warmup)
    begin = warmup if apart else 0.0
    value = _scheduled(recipe, max(n - begin, 0), recipe.epochs * per_epoch - begin, per_epoch)
    if warm_up and recipe.warmup == "scaled" and n + 1 < warmup:
        value *= (n + 1) / warmup
    return value


def _scheduled(recipe: Any, n: float, end: float, per_epoch: int) -> float:
    """The schedule's rate after ``n`` of its ``end`` updates."""
    lr, final = float(recipe.lr), float(recipe.final_lr)
    if recipe.schedule == "step":
        reached = sum(n >= milestone * per_epoch for milestone in recipe.milestones)
        return float(lr * recipe.lr_decay**reached)
    if recipe.schedule == "constant":
        return lr
    done = min(n / end, 1.0)
    if recipe.schedule == "linear":
        return lr + (final - lr) * done
    return _cosine(lr, final, done)


def _one_cycle(recipe: Any, n: int, per_epoch: int, warmup: float, *, warm_up: bool) -> float:
    """torch's OneCycleLR with ``pct_start = W / E`` and two phases."""
    peak, last = warmup - 1, recipe.epochs * per_epoch - 1
    if n <= peak:
        if not warm_up:
            return float(recipe.lr)
        return _cosine(recipe.warmup_lr, recipe.lr, n / peak if peak > 0 else 1.0)
    return _cosine(recipe.lr, recipe.final_lr, min((n - peak) / (last - peak), 1.0))


def _cosine(first: float, last: float, done: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def check_schedule(recipe: Any) -> None:
    """Raises UserError for settings of the schedule that contradict each other."""
    if recipe.final_lr > recipe.lr:
        raise UserError(
            f"final_lr is {recipe.final_lr}: it must be at most lr, {recipe.lr}, from which the rate falls"
        )
    if recipe.warmup_lr > recipe.lr:
        raise UserError(
            f"warmup_lr is {recipe.warmup_lr}: it must be at most lr, {recipe.lr}, to which it rises"
        )
    if recipe.schedule == "one_cycle":
        if recipe.warmup != "before":
            raise UserError(
                f"warmup is {recipe.warmup!r}, but one_cycle's peak comes after the warm-up: set warmup "
                "to before"
            )
        if not 0 < recipe.warmup_epochs < recipe.epochs:
            raise UserError(
                f"warmup_epochs is {recipe.warmup_epochs}: one_cycle needs its peak, above 0 and below "
                f"epochs, {recipe.epochs}; torch's is at 0.3 of them, {0.3 * recipe.epochs:g}"
            )
        return
    if recipe.warmup != "scaled" and not 0 < recipe.warmup_epochs < recipe.epochs:
        raise UserError(
            f"warmup_epochs is {recipe.warmup_epochs}: the warm-up {recipe.warmup!r} needs a number above "
            f"0 and below epochs, {recipe.epochs}"
        )


def said(recipe: Any) -> str:
    """The schedule in a few words, for the line about a scaled one."""
    if recipe.schedule in ENDING:
        line = f"{recipe.schedule} from {recipe.lr:g} to {recipe.final_lr:g}"
    else:
        line = f"rate {recipe.lr:g} throughout"
    if recipe.warmup_epochs:
        line += f" with {recipe.warmup_epochs:.3g} epochs of warm-up"
    return line
