"""How long the trials of ``engine="auto"`` may take, and what ends a trial within a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter as clock
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.run.autotuner import allowance

# Why a candidate has no timing.
OVER = "not timed: the time for tuning was over"
STOPPED = "not timed: the run was stopped"


class TrialEndedError(BaseException):
    """A trial was ended within a step; no ``except Exception`` of a student's code catches it."""


class Allowance:
    """The seconds that tuning may take for ``steps`` more steps.

    Without a limit until a step's time is known. ``say``: prints the limit when it begins to count.
    ``stopped``: whether a signal asks the run to end.
    """

    def __init__(
        self,
        steps: float = math.inf,
        say: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.steps, self.say, self.stopped = steps, say, stopped
        self.step_ms = 0.0
        self.started, self.seconds = clock(), math.inf

    @property
    def left(self) -> float:
        return self.seconds - (clock() - self.started)

    @property
    def over(self) -> str:
        """Why no further step may be timed; empty while one may."""
        if self.stopped():
            return STOPPED
        return OVER if self.left <= 0 else ""

    def limit(self, step_ms: float) -> None:
        """Sets the limit by the time of a step. It counts from the first call; a later one with a shorter
        step lowers it. What is compiled in the first steps isn't tuning's: the run needs it."""
        begun = self.seconds < math.inf
        if begun and step_ms >= self.step_ms:
            return
        self.step_ms, self.seconds = step_ms, allowance(step_ms, self.steps)
        if begun:
            return
        self.started = clock()
        minutes = self.steps * step_ms / 60e3
        self.say(
            f"measuring how the steps run fastest, for at most {self.seconds:.0f} s of a run of about "
            f"{minutes:.1f} min; the timings are kept for later runs"
        )

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Ends what runs within it, between two of its operators, once no time is left.

        Raises:
            TrialEndedError: at the first operator after that.
        """
        with _Cut(self):
            yield


class _Cut(TorchDispatchMode):
    def __init__(self, allowed: Allowance) -> None:
        super().__init__()
        self.allowed = allowed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.allowed.over:
            raise TrialEndedError
        return func(*args, **(kwargs or {}))
