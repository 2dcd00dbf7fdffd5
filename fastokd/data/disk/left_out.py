"""Damaged files of a folder of images: one rule for sets in memory, streamed sets and ``fastokd prepare``.

A file that can't be used (damaged, empty, an unsupported format) is left out of every split, and the run
names it. A split with more than ``FEW`` such files, if they are more than ``MOST`` of it, is an error, and so
is a class whose images can all not be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.data.disk.layout import refuse_unusable_classes
from fastokd.errors import UserError

MOST = 0.05
FEW = 10
# Files named in a note.
NAMED = 3


class Seen(NamedTuple):
    """One file of a split: its path from the root, its class id (-1 if unknown), why it can't be used or
    "", and whether that is its content's fault and not its place's."""

    path: str
    label: int
    fault: str
    damaged: bool


def refuse_damage(folder: Path, classes: Iterable[str], files: Sequence[Seen]) -> None:
    """Raises UserError if too many ``files`` of the split in ``folder`` are damaged, or all of a class."""
    refuse_unusable_classes(folder, classes, [(f.label, f.fault) for f in files if f.label >= 0])
    refusal = too_many(folder, files)
    if refusal:
        raise UserError(refusal)


def refuse_new_damage(folder: Path, files: Sequence[Seen], kept: Mapping[str, Any]) -> None:
    """Raises UserError if one of ``files`` is damaged that a begun run didn't leave out: its metrics would
    be over fewer images. ``kept``: the run's data.json."""
    known = {file["path"] for file in kept.get("left_out", ())}
    new = [file for file in files if file.fault and file.damaged and file.path not in known]
    if new:
        raise UserError(
            f"{len(new):,} of {len(files):,} files in {folder} can't be used, and the run didn't leave "
            f"them out when it began ({_named(new)}): replace or remove them"
        )


def too_many(folder: Path, files: Sequence[Seen]) -> str:
    """The sentence on a split of which too many ``files`` are damaged; "" if few or none are."""
    damaged = [file for file in files if file.fault and file.damaged]
    if len(damaged) <= max(FEW, MOST * len(files)):
        return ""
    return (
        f"{len(damaged):,} of {len(files):,} files in {folder} can't be used, and a run leaves out at "
        f"most {MOST:.0%} ({_named(damaged)}): replace or remove them"
    )


def what_is_left_out(files: Sequence[Seen]) -> str:
    """A clause that counts those of ``files`` with a fault and names the first; "" if there is none."""
    faults = [file for file in files if file.fault]
    if not faults:
        return ""
    are = "is" if len(faults) == len(files) == 1 else "are"
    more = "" if len(faults) <= NAMED else "; the run's data.json lists all"
    return f"{len(faults):,} of {len(files):,} files {are} quarantined and not read ({_named(faults)}{more})"


def _named(faults: Sequence[Seen]) -> str:
    first = "; ".join(f"{file.path}, {file.fault}" for file in faults[:NAMED])
    return f"the first: {first}"
