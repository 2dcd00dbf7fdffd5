"""Means, deviations, and the difference of two means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Sample:
    """A mean over runs; ``std`` (with n - 1) is None for a single run."""

    mean: float
    std: float | None
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        """At least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return Sample(statistics.mean(values), std, len(values))

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 2) -> str:
        """Mean and deviation."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Difference:
    """A difference, and its 95% interval if both sides have a deviation."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 2) -> str:
        """The difference, and the interval in brackets."""
        if self.interval is None:
            return f"{self.value:+.{digits}f}"
        low, high = self.interval
        return f"{self.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def welch(ours: Sample, theirs: Sample) -> Difference:
    """ours - theirs, with Welch's interval: unequal variances, Satterthwaite's degrees of freedom."""
    value = ours.mean - theirs.mean
    if ours.std is None or theirs.std is None:
        return Difference(value, None)
    a, b = ours.std**2 / ours.runs, theirs.std**2 / theirs.runs
    variance = a + b
    if variance == 0:
        return Difference(value, (value, value))
    freedom = variance**2 / (a**2 / (ours.runs - 1) + b**2 / (theirs.runs - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return Difference(value, (value - half, value + half))
