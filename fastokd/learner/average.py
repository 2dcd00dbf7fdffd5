"""Averages of students' weights over the steps: exponential (EMA) or uniform (SWA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.learner.norms import statistics_of
from fastokd.recipe.recipe import Recipe

# Accuracy: an average that scores this much less than the weights spans too many steps.
FAR = 0.05
# A count of updates after which no decay is warming up.
WARM = 2**53


@dataclass(frozen=True)
class Averaging:
    """How weights are averaged.

    ``decay``: of the exponential average; None for the uniform one. ``warmup``: the decay rises from
    0.1. ``start``: the epoch from which weights are averaged. ``every``: steps between two updates.
    ``statistics``: whether the norms' running statistics are averaged with the weights; else they are
    recomputed at each evaluation (``learner/norms.py``).
    """

    decay: float | None = 0.999
    warmup: bool = True
    start: int = 0
    every: int = 1
    statistics: bool = True

    @staticmethod
    def of(recipe: Recipe) -> Averaging:
        """What the recipe asks for."""
        return Averaging(
            None if recipe.swa else recipe.ema,
            recipe.ema_warmup,
            recipe.average_start,
            recipe.average_every,
            recipe.average_norms == "averaged",
        )


class Average:
    """``average <- average + share (weights - average)`` after a step.

    After ``t`` updates the next ``share`` of a uniform average is ``1 / (t + 1)``: Izmailov et al.,
    *Averaging Weights Leads to Wider Optima*, section 3, as ``torch.optim.swa_utils.AveragedModel``.

    That of an exponential average is ``1 - decay``; with ``warmup`` ``max(1 - decay, 9 / (10 + t))``:
    the average then spans about the last tenth of the steps taken, until that is more than ``decay``
    lets it span. With a constant ``1 - decay`` a run shorter than a few ``1 / (1 - decay)`` steps would
    keep its initial weights. The average is always a convex combination, so averaged variances stay
    positive.

    Before ``how.start`` the average is a copy of the weights. Running statistics are averaged as
    weights are; those that are recomputed at an evaluation are copied until then, as counts are.

    Attributes:
        states: the average of each student under its plain keys, the trunk's included, whatever the
            engine.
        updates: 0-d int64 on the weights' device, t. It is part of a checkpoint.
        steps: 0-d int64 on the same device, the steps since the start, or None where every step
            updates the average.
    """

    def __init__(
        self, cohort: Cohort, students: tuple[int, ...], how: Averaging, kept_student: int
    ) -> None:
        """``students``: those whose weights are averaged, ``kept_student`` among them."""
        self.cohort, self.how, self.kept_student = cohort, how, kept_student
        self.states = {
            index: {key: value.clone() for key, value in cohort.student_state(index).items()}
            for index in students
        }
        # Entries that an update copies.
        self._copied = {
            index: set() if how.statistics else statistics_of(cohort, index) for index in students
        }
        device = next(iter(self.states[students[0]].values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = None if how.every == 1 else torch.zeros_like(self.updates)

    def share(self) -> Tensor:
        """The share of the next update: 0-d on the device, so a captured step sees it change."""
        if self.how.decay is None:
            return 1 / (1 + self.updates.double())
        if not self.how.warmup:
            return torch.full_like(self.updates, 1 - self.how.decay, dtype=torch.float64)
        return (9 / (10 + self.updates.float())).clamp(min=1 - self.how.decay)

    def tensors(self) -> list[Tensor]:
        """The tensors that an update writes in place."""
        counters = [self.updates, *([] if self.steps is None else [self.steps])]
        return [*(value for state in self.states.values() for value in state.values()), *counters]

    @torch.no_grad()
    def update(self, epoch: Tensor) -> None:
        """After a step of the 0-d ``epoch``: adds the present weights, or copies them before the start."""
        floats: list[Tensor] = []
        averages: list[Tensor] = []
        for index, state in self.states.items():
            for key, value in self.cohort.student_state(index).items():
                if value.is_floating_point() and key not in self._copied[index]:
                    floats.append(value)
                    averages.append(state[key])
                else:
                    state[key].copy_(value)
        share, count = self._next(epoch)
        steps = torch._foreach_sub(floats, averages)
        torch._foreach_mul_(steps, share.to(steps[0].dtype))
        torch._foreach_add_(averages, steps)
        self.updates.add_(count)

    def _next(self, epoch: Tensor) -> tuple[Tensor, Tensor | int]:
        """The share of this step, and the number of updates that it is: 0 or 1."""
        share = self.share()
        if self.how.start == 0 and self.steps is None:
            return share, 1
        begun = epoch >= self.how.start
        due = begun
        if self.steps is not None:
            self.steps.add_(begun)
            due = begun & (self.steps % self.how.every == 0)
            share = torch.where(due, share, torch.zeros_like(share))
        return torch.where(begun, share, torch.ones_like(share)), due

    def entries(self) -> dict[str, Tensor]:
        """Everything by its name in a checkpoint: ``ema.<key>`` is of the kept student, ``ema<s>.<key>``
        of student s."""
        found = {
            f"{prefix_of(index, self.kept_student)}{key}": value
            for index, state in self.states.items()
            for key, value in state.items()
        }
        found["ema_updates"] = self.updates
        return found if self.steps is None else {**found, "ema_steps": self.steps}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Loads what :meth:`entries` returned from a checkpoint's ``tensors``. Checkpoints of earlier
        versions lack ``ema_updates``: theirs had no warm-up.

        Raises:
            KeyError: an entry is missing.
        """
        for name, value in self.entries().items():
            if name == "ema_updates" and name not in tensors:
                value.fill_(WARM)
            else:
                value.copy_(tensors[name])

    def warning(self, rows: list[dict[str, Any]]) -> str | None:
        """A warning where the average scores far less than the student itself in the last measured row
        of ``metrics.jsonl``, or None."""
        measured = [row["test"] for row in rows if "ema_top1" in row.get("test", ())]
        if not measured:
            return None
        averaged, itself = measured[-1]["ema_top1"], measured[-1]["student_top1"][self.kept_student]
        if itself - averaged <= FAR:
            return None
        if self.how.decay is None:
            which, other = "swa", "a later --set average_start"
        else:
            shorter = 1 - 4 * self.share().item()
            which = f"--ema {self.how.decay}"
            other = f"set --ema to {shorter:.3g}" if shorter > 0 else "leave it out"
        end = "" if other == "leave it out" else ", or leave it out"
        return (
            f"the average of {which}, which is what is kept, scores {averaged:.1%}, and "
            f"the student itself {itself:.1%}: it spans too many steps of so short a run; {other}{end}"
        )


def prefix_of(student: int, kept_student: int) -> str:
    """The prefix of a student's average among a checkpoint's tensors."""
    return "ema." if student == kept_student else f"ema{student}."
