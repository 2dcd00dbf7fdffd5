"""The rows of a comparison: means over seeds, and differences paired by seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.compare.contestants import ALONE, Contestant
from fastokd.compare.cost import NEAR
from fastokd.compare.runs import Failure, Outcome, entry_json, outcome_json
from fastokd.compare.wanted import WHOLE, Condition
from fastokd.measured.answers import pooled
from fastokd.report.published import differences
from fastokd.report.statistics import Paired, Sample, holm, interval_of, paired


@dataclass(frozen=True)
class Against:
    """A method minus a student alone, paired by seed, in points of the kept student's top-1.

    ``p``: of the paired test, corrected by Holm for the number of methods; None where there is no test.
    """

    other: str
    paired: Paired
    p: float | None = None


@dataclass(frozen=True)
class Row:
    """A contestant under one condition, over its seeds.

    ``against``: the student alone with the same images (``"images"``), the one with the same
    multiply-accumulates (``"macs"``), and the larger one (``"larger"``).
    """

    contestant: Contestant
    outcomes: tuple[Outcome, ...]
    against: dict[str, Against]

    def sample(self, value: Callable[[Outcome], float | None]) -> Sample | None:
        """The mean over the seeds; None if one has no value."""
        values = [
            number
            for one in self.outcomes
            if (number := value(one)) is not None and math.isfinite(number)
        ]
        return Sample.of(values) if values and len(values) == len(self.outcomes) else None

    @property
    def kept(self) -> Sample:
        """The kept student's top-1 in %."""
        return Sample.of([one.kept for one in self.outcomes])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean of :attr:`kept`."""
        return interval_of([one.kept for one in self.outcomes])

    @property
    def macs(self) -> float:
        """Multiply-accumulates spent by a run, their mean over the seeds."""
        return sum(one.entry.macs for one in self.outcomes) / len(self.outcomes)


@dataclass(frozen=True)
class Section:
    """The rows under one condition."""

    condition: Condition
    rows: tuple[Row, ...]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind of contestant."""
        return [row for row in self.rows if row.contestant.kind == kind]


def sections(rows: Sequence[Contestant], outcomes: Sequence[Outcome]) -> list[Section]:
    """One section for each condition that has an outcome, in the order of the runs."""
    larger = next((row for row in rows if row.kind == "larger"), None)
    others: dict[str, Callable[[Contestant], str | None]] = {
        "images": lambda row: ALONE,
        "macs": lambda row: row.equal,
        "larger": lambda row: larger.label if larger and _costs_alike(row, larger) else None,
    }
    found = []
    conditions = dict.fromkeys(one.entry.condition for one in outcomes)
    for condition in sorted(conditions, key=lambda one: one != WHOLE):
        of_it = [one for one in outcomes if one.entry.condition == condition]
        made = []
        for row in rows:
            its = tuple(one for one in of_it if one.entry.contestant.label == row.label)
            if its:
                made.append(Row(row, its, {}))
        for against, other_of in others.items():
            made = _compared(made, against, other_of)
        found.append(Section(condition, tuple(made)))
    return found


def _costs_alike(one: Contestant, other: Contestant) -> bool:
    return 1 / NEAR <= one.spent / other.spent <= NEAR


def _compared(
    rows: list[Row], against: str, other_of: Callable[[Contestant], str | None]
) -> list[Row]:
    """The rows, each with its difference from the row that ``other_of`` names. Holm's correction is over the
    methods that are tested."""
    by_label = {row.contestant.label: row for row in rows}
    found: dict[str, Against] = {}
    for row in rows:
        kind, label = row.contestant.kind, other_of(row.contestant)
        others = ("longer", "larger") if against == "images" else ()
        other = by_label.get(label or "")
        if other is None or kind not in ("method", *others):
            continue
        theirs = {one.entry.seed: one.kept for one in other.outcomes}
        pairs = [
            (one.kept, theirs[one.entry.seed]) for one in row.outcomes if one.entry.seed in theirs
        ]
        if pairs:
            ours, its = zip(*pairs, strict=True)
            found[row.contestant.label] = Against(other.contestant.label, paired(ours, its))
    tested = [
        label
        for label, one in found.items()
        if one.paired.p is not None and by_label[label].contestant.kind == "method"
    ]
    p_values = [p for label in tested if (p := found[label].paired.p) is not None]
    for label, p in zip(tested, holm(p_values), strict=True):
        found[label] = dataclasses.replace(found[label], p=p)
    return [
        dataclasses.replace(row, against=row.against | {against: found[row.contestant.label]})
        if row.contestant.label in found
        else row
        for row in rows
    ]


def settings_of(rows: Sequence[Contestant]) -> list[tuple[str, str]]:
    """For each contestant, in words, the settings in which its recipe differs from that of the student
    alone."""
    base = rows[0].recipe
    found = []
    for row in rows[1:]:
        changes = {name: ours for name, (ours, _) in differences(row.recipe, base).items()}
        options = {**row.recipe.method_options, **changes}
        words = [
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in options.items()
            if name not in ("method", "reported")
        ]
        found.append((row.label, ", ".join(words) or "nothing"))
    return found


def to_json(
    found: Sequence[Section], rows: Sequence[Contestant], failures: Sequence[Failure]
) -> dict[str, Any]:
    """The comparison's numbers, for ``comparison.json``."""
    return {
        "contestants": [
            {"row": row.label, "kind": row.kind, "macs_per_image": row.macs, "equal": row.equal,
             "recipe": row.recipe.to_json()}
            for row in rows
        ],
        "sections": [
            {"condition": section.condition.title, **dataclasses.asdict(section.condition),
             "rows": [_row_json(row) for row in section.rows]}
            for section in found
        ],
        "runs": [outcome_json(one) for section in found for row in section.rows for one in row.outcomes],
        "failed": [
            {**entry_json(one.entry), "why": one.why, "traceback": one.traceback} for one in failures
        ],
    }  # fmt: skip


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "row": row.contestant.label,
        "kind": row.contestant.kind,
        "seeds": [one.entry.seed for one in row.outcomes],
        "kept_top1": dataclasses.asdict(row.kept),
        "kept_top1_interval": row.interval,
        "macs": row.macs,
        "reliability": pooled([one.calibration for one in row.outcomes]),
        "against": {
            name: {
                "row": one.other,
                "difference": one.paired.difference.value,
                "interval": one.paired.difference.interval,
                "pairs": one.paired.pairs,
                "p": one.paired.p,
                "p_holm": one.p,
            }
            for name, one in row.against.items()
        },
    }
