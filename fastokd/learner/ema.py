"""A running average of the kept student's weights (``--ema``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastokd.cohort import Cohort

# Accuracy: an average that scores this much less than the weights spans too many steps.
FAR = 0.05
# A count of updates after which no decay is warming up.
WARM = 2**53


class LeaderAverage:
    """``average <- average + share (weights - average)`` after every step, from the first weights.

    After ``t`` updates the next ``share`` is ``max(1 - decay, 9 / (10 + t))``: the average spans
    about the last tenth of the steps taken, until that is more than ``decay`` lets it span. With a
    constant ``1 - decay`` a run shorter than a few ``1 / (1 - decay)`` steps would keep its initial
    weights. The average is always a convex combination, so averaged variances stay positive.

    Running statistics are averaged as weights are; counts are copied.

    Attributes:
        state: the average under the student's plain keys, the trunk's included, whatever the engine.
        updates: 0-d int64 on the weights' device, t. It is part of a checkpoint.
    """

    def __init__(self, cohort: Cohort, index: int, decay: float) -> None:
        self.cohort = cohort
        self.index = index
        self.decay = decay
        self.state = {key: value.clone() for key, value in cohort.student_state(index).items()}
        device = next(iter(self.state.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def share(self) -> Tensor:
        """The share of the next update: 0-d on the device, so a captured step sees it change."""
        return (9 / (10 + self.updates.float())).clamp(min=1 - self.decay)

    def tensors(self) -> list[Tensor]:
        """The tensors that an update writes in place."""
        return [*self.state.values(), self.updates]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the present weights."""
        now = self.cohort.student_state(self.index)
        floats = [key for key, value in now.items() if value.is_floating_point()]
        counts = [key for key in now if key not in set(floats)]
        share = self.share()
        averages = [self.state[key] for key in floats]
        steps = torch._foreach_sub([now[key] for key in floats], averages)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(averages, steps)
        for key in counts:
            self.state[key].copy_(now[key])
        self.updates.add_(1)

    def warning(self, rows: list[dict[str, Any]]) -> str | None:
        """A warning where the average scores far less than the student itself in the last measured row
        of ``metrics.jsonl``, or None."""
        measured = [row["test"] for row in rows if "ema_top1" in row.get("test", ())]
        if not measured:
            return None
        averaged, itself = measured[-1]["ema_top1"], measured[-1]["student_top1"][self.index]
        if itself - averaged <= FAR:
            return None
        shorter = 1 - 4 * self.share().item()
        other = f"set --ema to {shorter:.3g}, or leave it out" if shorter > 0 else "leave it out"
        return (
            f"the average of --ema {self.decay}, which is what is kept, scores {averaged:.1%}, and "
            f"the student itself {itself:.1%}: it spans too many steps of so short a run; {other}"
        )

    def load(self, state: dict[str, Tensor], updates: Tensor | None) -> None:
        """Loads an average's state, whose keys and shapes must match.

        ``updates``: None for a checkpoint of an earlier version, which has no warm-up.
        """
        if state.keys() != self.state.keys():
            missing = sorted(state.keys() ^ self.state.keys())
            raise KeyError(f"the average's entries differ in {missing[0]}")
        for key, value in self.state.items():
            value.copy_(state[key])
        if updates is None:
            self.updates.fill_(WARM)
        else:
            self.updates.copy_(updates)
