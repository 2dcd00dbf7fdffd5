"""What the paired tests of a comparison say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fastokd.compare.results import Row, Section
from fastokd.host.names import counted

LEVEL = 0.05
BESIDE = {
    "images": "Compared with one student that sees the same images",
    "macs": "Compared with one student that spends as many multiply-accumulates",
    "larger": "Compared with the larger student",
}


def verdicts(found: Sequence[Section]) -> list[str]:
    """Which methods are better or worse than each student alone by the paired test, corrected by Holm, at 5%:
    for the whole training set, and for the other conditions where any is."""
    said, silent = [], 0
    for section in found:
        first = section is found[0]
        where = "" if first else f" ({section.condition.title})"
        for against, beside in BESIDE.items():
            rows = [row for row in section.of("method") if against in row.against]
            if rows and (first or _clear(rows, against)):
                said.append(f"{beside}{where}: {_said(rows, against)}.")
            elif rows:
                silent += 1
    if silent:
        said.append(
            f"Under the other conditions, {counted(silent, 'more comparison')} with a student alone "
            f"{'finds' if silent == 1 else 'find'} no significant difference."
        )
    if len(found) > 1:
        said.append("Each of these comparisons is corrected for its number of methods by itself.")
    return said


def _clear(rows: Sequence[Row], against: str) -> list[Row]:
    found = [(row, row.against[against].p) for row in rows]
    return [row for row, p in found if p is not None and p < LEVEL]


def _said(rows: Sequence[Row], against: str) -> str:
    if all(row.against[against].p is None for row in rows):
        return "no test, as there are fewer than two pairs of seeds or no deviation"
    clear = _clear(rows, against)
    better = [row for row in clear if row.against[against].paired.difference.value > 0]
    worse = [row for row in clear if row not in better]
    parts = [
        f"{', '.join(_with_difference(row, against) for row in its)} {'is' if len(its) == 1 else 'are'} {what}"
        for its, what in ((better, "better"), (worse, "worse"))
        if its
    ]
    untested = [row for row in rows if row.against[against].p is None]
    if untested:
        parts.append(
            f"{counted(len(untested), 'method')} can't be tested (fewer than two pairs of seeds, or equal "
            "differences)"
        )
    if left := len(rows) - len(clear) - len(untested):
        of = "" if parts else f" of {len(rows)}"
        parts.append(f"{counted(left, 'method')}{of} can't be told apart from it")
    return "; ".join(parts)


def _with_difference(row: Row, against: str) -> str:
    one = row.against[against]
    return f"{row.contestant.label} ({one.paired.difference.text()}, p {'<' if (one.p or 0) < 1e-4 else '='} {max(one.p or 0, 1e-4):.2g})"
