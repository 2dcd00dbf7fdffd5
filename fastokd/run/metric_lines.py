"""``metrics.jsonl``: a line an epoch, and none lost where the disk refuses one for a while."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError

Row = dict[str, Any]
# Of every split that was measured.
MEASURED = {
    *("leader_top1", "mean_top1", "student_top1", "ensemble_top1", "ensemble_logits_top1"),
    "diversity",
}


class MetricLines:
    """The lines of one run; those that couldn't be written are kept, and written first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Row] = []
        self._torn = False

    def read(self) -> list[Row]:
        """The epochs so far; a last line that was cut off is left out.

        Raises:
            UserError: a line isn't an epoch's.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: {error}; remove the line that is") from error
        if not all(map(_is_epoch, rows)):
            raise UserError(f"{self.path} is damaged: a line isn't an epoch's; remove it")
        return rows

    def replace(self, rows: Sequence[Row]) -> None:
        """Leaves these lines and no others; raises OSError, and then they are as they were."""
        write_durably(self.path, b"".join(map(_line, rows)))

    def add(self, row: Row) -> None:
        """One epoch more, not yet written."""
        self._waiting.append(row)

    def write(self) -> None:
        """Writes what waits.

        Raises:
            OSError: it still waits; the file's whole lines are as they were.
        """
        if not self._waiting:
            return
        if self._torn:
            # A part of a line, or a line that was written but not flushed, may be there.
            first = self._waiting[0]["epoch"]
            before = [row for row in self.read() if row["epoch"] < first]
            self.replace([*before, *self._waiting])
        else:
            self._torn = True
            with open(self.path, "ab") as file:
                file.write(b"".join(map(_line, self._waiting)))
                file.flush()
                os.fsync(file.fileno())
        self._torn = False
        self._waiting.clear()


def choosing_split(rows: Sequence[Row]) -> str:
    """The split that the best epoch of ``rows`` is chosen on: ``"val"``, or ``"test"`` where images
    weren't held out in all of them."""
    return "val" if all(row.get("val") for row in rows) else "test"


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _is_epoch(row: Any) -> bool:
    """Whether a line has what every reader takes for granted."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    if type(row.get("step", 0)) is not int or not isinstance(row.get("seconds", 0), (int, float)):
        return False
    splits = [row[name] for name in ("val", "test") if row.get(name) is not None]
    return all(isinstance(split, dict) and split.keys() >= MEASURED for split in splits)
