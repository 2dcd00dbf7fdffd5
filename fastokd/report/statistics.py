"""Means, deviations, the difference of two means, and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtr, stdtrit


@dataclass(frozen=True)
class Sample:
    """A mean over runs; ``std`` (with n - 1) is None for a single run."""

    mean: float
    std: float | None
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        """At least one value."""
        if not all(map(math.isfinite, values)):
            return Sample(math.nan, math.nan if len(values) > 1 else None, len(values))
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
    """ours - theirs, with Welch's interval: unequal variances, Satterthwaite's degrees of freedom.

    None where a deviation or a number of runs (0) isn't known.
    """
    value = ours.mean - theirs.mean
    if ours.std is None or theirs.std is None or not ours.runs * theirs.runs:
        return Difference(value, None)
    a, b = ours.std**2 / ours.runs, theirs.std**2 / theirs.runs
    variance = a + b
    if variance == 0:
        return Difference(value, (value, value))
    freedom = variance**2 / (a**2 / (ours.runs - 1) + b**2 / (theirs.runs - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return Difference(value, (value - half, value + half))


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences and Student's t test of it, two-sided.

    ``p`` is None for fewer than two pairs and for equal differences that aren't 0, and so is the interval.
    """

    difference: Difference
    p: float | None
    pairs: int


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean by Student's t; None for fewer than two values."""
    sample = Sample.of(values)
    if sample.std is None:
        return None
    half = float(stdtrit(sample.runs - 1, 0.975)) * sample.std / math.sqrt(sample.runs)
    return sample.mean - half, sample.mean + half


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """ours - theirs, pair by pair (at least one).

    Equal differences have no deviation to test with: p is then 1 where they are 0, and else unknown, as is
    the interval.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    sample = Sample.of(differences)
    if sample.std is None:
        return Paired(Difference(sample.mean, None), None, 1)
    if sample.std <= 1e-9 * max(1.0, abs(sample.mean)):
        zero = abs(sample.mean) < 1e-9
        known = (0.0, 0.0) if zero else None
        return Paired(Difference(sample.mean, known), 1.0 if zero else None, sample.runs)
    t = sample.mean / (sample.std / math.sqrt(sample.runs))
    p = 2 * float(stdtr(sample.runs - 1, -abs(t)))
    return Paired(Difference(sample.mean, interval_of(differences)), p, sample.runs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for the number of tests (Holm, 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a share of ``count`` independent trials (Wilson, 1927)."""
    z2 = float(ndtri(0.975)) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * share * (1 - share) / count + (z2 / (2 * count)) ** 2) / (1 + z2 / count)
    return centre - half, centre + half
