"""A running average of the weights of the student that is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.cohort import Cohort


class LeaderAverage:
    """``average <- decay average + (1 - decay) weights`` after every step, from the first weights.

    Running statistics are averaged as weights are; counts are copied. ``state`` has the student's
    plain keys, the trunk's included, whatever the engine.
    """

    def __init__(self, cohort: Cohort, index: int, decay: float) -> None:
        self.cohort = cohort
        self.index = index
        self.decay = decay
        self.state = {key: value.clone() for key, value in cohort.student_state(index).items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step more."""
        now = self.cohort.student_state(self.index)
        floats = [key for key, value in now.items() if value.is_floating_point()]
        counts = [key for key in now if key not in set(floats)]
        torch._foreach_lerp_(
            [self.state[key] for key in floats], [now[key] for key in floats], 1 - self.decay
        )
        for key in counts:
            self.state[key].copy_(now[key])

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over another average's state, whose keys and shapes must be these."""
        if state.keys() != self.state.keys():
            missing = sorted(state.keys() ^ self.state.keys())
            raise KeyError(f"the average's entries differ in {missing[0]}")
        for key, value in self.state.items():
            value.copy_(state[key])
