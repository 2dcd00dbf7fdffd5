"""Reads reports of ``bench/gpu_first.py`` for the documentation, and formats cells of tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fastokd.errors import UserError

HOW = "measured-gpu"
# Each cohort's shapes, and the sections that time its steps.
COHORTS = {
    "branch ResNet-32": ("CIFAR-100's shapes, S 4, B 128", ("steps_resnet32", "compile")),
    "network ResNet-32": ("CIFAR-100's shapes, S 4, B 128", ("steps_resnet32",)),
    "network ResNet-34": ("224x224, S 4, B 256", ("steps_imagenet",)),
    "branch ResNet-18": ("224x224, S 4, B 256", ("steps_imagenet",)),
}
Measurement = dict[str, Any]
# The text of a region; None if nothing of it was measured.
Region = Callable[["Measured"], "str | None"]


@dataclass(frozen=True)
class Found:
    """A section of a report and the call that ran it; both empty if it wasn't run."""

    entry: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def card(self) -> str:
        """The GPU's name."""
        return str((self.call.get("card") or {}).get("name", ""))

    @property
    def rows(self) -> list[Measurement]:
        return list(self.entry.get("rows", []))

    def figure(self, name: str) -> float | None:
        return self.entry.get("figures", {}).get(name)

    @property
    def source(self) -> str:
        """The kind, card and date of a measurement, for the line above its table."""
        day = datetime.fromisoformat(self.call["started"].rstrip("Z"))
        said = f"{HOW}, {self.card}, {day.day} {day:%B %Y}"
        if torch := self.entry.get("torch"):
            said += f", torch {torch}"
        ended = self.entry.get("status")
        return said + ("; its time limit ended the section early" if ended == "timeout" else "")


class Measured:
    """The sections of one or several reports; the latest call's if several ran a section."""

    def __init__(self, reports: Sequence[dict[str, Any]]) -> None:
        self.sections: dict[str, Found] = {}
        for report in sorted(reports, key=lambda report: report["calls"][-1]["started"]):
            for name, entry in report["sections"].items():
                if "call" in entry:  # a section that was skipped has none
                    self.sections[name] = Found(entry, report["calls"][entry["call"]])

    def __getitem__(self, name: str) -> Found:
        return self.sections.get(name, Found())

    def ceiling(self, figure: str, card: str) -> float | None:
        """The measured limit of this card, else None."""
        machine = self["machine"]
        return machine.figure(figure) if machine.card == card else None

    def steps(self, cohort: str) -> dict[str, tuple[Found, Measurement]]:
        """The timed programs of a cohort by their names without the cohort's, section by section."""
        found: dict[str, tuple[Found, Measurement]] = {}
        for name in COHORTS[cohort][1]:
            for row in self[name].rows:
                if row["name"].startswith(f"{cohort} "):
                    program = row["name"].removeprefix(f"{cohort} ")
                    if program in found:
                        program = f"{program} ({name})"
                    found[program] = (self[name], row)
        return found


def read(path: Path) -> dict[str, Any]:
    """Reads a measured report.

    Raises:
        UserError: the file can't be read, isn't a report, or is one of a dry run.
    """
    try:
        report = json.loads(path.read_text())
        ways = [report["how"], *(call["how"] for call in report["calls"])]
        whole = bool(report["calls"]) and isinstance(report["sections"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is no report of bench/gpu_first.py: name the report.json it wrote")
    if other := [how for how in ways if how != HOW]:
        raise UserError(f"{path} isn't {HOW} ({other[0]}): run bench/gpu_first.py where a GPU is")
    return report


def why_blank(row: Measurement) -> str | None:
    """The reason why a program's step has no figure; None if it has one."""
    if "error" in row:
        return row["error"].splitlines()[-1].split(":")[0]
    if "needs" in row:
        return f"it needed {row['needs']}"
    if "ms" not in row:
        return "it wasn't timed"
    if not row.get("finite", True) or row.get("steps_not_taken"):
        return "its loss wasn't finite"
    return None


def number(value: float | None, digits: int = 3) -> str:
    """A figure with ``digits`` significant digits; blank for None."""
    if value is None:
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def count(value: float | None) -> str:
    """A whole number; blank for None."""
    return "" if value is None else f"{value:,.0f}"


def ratio(above: float | None, below: float | None) -> float | None:
    """``above / below``; None unless both are known."""
    return None if above is None or not below else above / below


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
