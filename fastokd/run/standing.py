"""How many of a run's epochs and steps are done. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.checkpoint import list_checkpoints, read_facts
from fastokd.errors import UserError


@dataclass(frozen=True)
class Standing:
    """Whole epochs, and the total of steps."""

    epochs: int
    step: int


def standing(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Standing:
    """The position of a run's newest checkpoint; without one, that of its lines ``rows``.

    An interrupted epoch has a line too. It has fewer steps than the epochs before it.
    """
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            facts = read_facts(path)
            return Standing(int(facts["epoch"]), int(facts["step"]))
        except (UserError, KeyError, TypeError, ValueError):  # noqa: PERF203
            continue  # the one before it
    return of_lines(rows)


def of_lines(rows: Sequence[Mapping[str, Any]]) -> Standing:
    """What a run's lines say, without its checkpoints."""
    if not rows:
        return Standing(0, 0)
    epochs, step = rows[-1]["epoch"] + 1, rows[-1].get("step", 0)
    a_whole = [row["step"] / (row["epoch"] + 1) for row in rows[:-1] if "step" in row]
    cut = bool(a_whole) and step < max(a_whole) * epochs
    return Standing(epochs - cut, step)
