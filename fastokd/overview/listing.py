"""What is known of every run in some folders. Nothing here imports torch, so thousands take seconds.

A run folder may be damaged, and may change or vanish while it is read: its entry then says why.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.checkpoint import STUDENT, list_checkpoints
from fastokd.errors import UserError, in_one_line
from fastokd.recipe.recipe import Recipe, settings
from fastokd.run.folders import is_run, run_folders
from fastokd.run.lock import is_locked
from fastokd.run.standing import standing

STATES = ("running", "finished", "interrupted", "failed")
# Begins the name of a file in a run folder that is being removed; a run that begins there deletes it.
REMOVAL = ".removal.tmp"
# What a run itself writes while it trains: its age is that of the newest.
_WRITTEN = ("recipe.json", "environment.json", "metrics.jsonl", STUDENT)
# Bytes at the end of metrics.jsonl that are read first; the most bytes of a recipe.
_TAIL, _LARGEST = 1 << 18, 1 << 22


@dataclass(frozen=True)
class Listed:
    """One run. ``None``: not known.

    ``epoch``: whole epochs so far, of ``epochs``. ``top1``: the test accuracy (fraction) that the recipe
    reports, ``of`` whom (:meth:`Recipe.judged`), after ``measured`` epochs. ``modified``: when the run last
    wrote, in seconds since 1970. ``bytes``: of all files, those with several names counted once.
    ``reason``: why it has failed.
    """

    folder: Path
    state: str
    modified: float
    bytes: int
    recipe: str | None = None
    seed: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    top1: float | None = None
    of: str | None = None
    measured: int | None = None
    reason: str | None = None


class _Unchecked(Recipe):
    """A recipe whose settings are checked one by one: together they take torch."""

    def __post_init__(self) -> None:
        for name in settings():
            value = getattr(self, name)
            (_check.__wrapped__ if isinstance(value, dict) else _check)(name, value)


@functools.lru_cache(maxsize=10000, typed=True)
def _check(name: str, value: Any) -> None:
    """Most runs have most of their settings in common."""
    settings()[name].check(name, value)


def list_runs(tops: Sequence[Path], *, links: bool = True) -> list[Listed]:
    """The runs at or below ``tops``, each once. ``links``: symbolic links below them are followed.

    Raises:
        UserError: as :func:`check_folders`.
    """
    check_folders(tops)
    folders = [folder for top in tops for folder in run_folders(top, links=links)]
    once = {os.path.realpath(folder): folder for folder in reversed(folders)}
    found = [look_at(folder) for folder in reversed(once.values())]
    return [run for run in found if run is not None]


def check_folders(tops: Sequence[Path]) -> None:
    """Raises UserError if one of ``tops`` isn't there, or is a file."""
    for top in tops:
        if not top.is_dir():
            what = "is a file" if top.exists() else "isn't there"
            raise UserError(f"{top} {what}: name a folder that holds runs")


def look_at(folder: Path, *, locked: bool | None = None) -> Listed | None:
    """The run in ``folder``; None if it is gone. ``locked``: whether it is running, if that is known."""
    try:
        running = is_locked(folder) if locked is None else locked  # first: it may end meanwhile
        modified, size = _times_and_bytes(folder)
    except OSError:
        return None
    known: dict[str, Any] = {}
    reason = None
    try:
        _read(folder, known)
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        if not is_run(folder):
            return None
        reason = in_one_line(error)
    with suppress(OSError), os.scandir(folder) as entries:
        if any(entry.name.startswith(REMOVAL) for entry in entries):
            reason = "its removal was interrupted: `fastokd clean --failed` finishes it"
    whole = known.pop("whole", False)
    state = "failed" if reason else "finished" if whole else "interrupted"
    return Listed(folder, "running" if running else state, modified, size, reason=reason, **known)


def _read(folder: Path, known: dict[str, Any]) -> None:
    """Adds to ``known`` what the run's files say, as far as they can be read."""
    recipe = _recipe(folder)
    known |= {"recipe": recipe.name, "seed": recipe.seed, "epochs": recipe.epochs}
    saved = bool(list_checkpoints(folder / "checkpoints"))
    rows, measured = read_rows(folder / "metrics.jsonl", every=not saved)
    known["epoch"] = standing(folder, rows).epochs
    known["whole"] = known["epoch"] >= recipe.epochs and (folder / STUDENT).is_file()
    if measured is None:
        return
    try:
        top1, of = recipe.score(measured["test"]), recipe.judged(measured["test"])
        if not 0 <= top1 <= 1:
            raise ValueError(f"an accuracy is {top1}")
    except UserError:  # of a method that isn't loaded
        raise
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"metrics.jsonl is damaged: {in_one_line(error)}") from error
    known |= {"top1": top1, "of": of, "measured": measured["epoch"] + 1}


def _recipe(folder: Path) -> Recipe:
    try:
        values = json.loads(_plain(folder / "recipe.json"))
        if isinstance(values, dict) and "ema" not in values:  # in earlier versions an option
            begun = folder / "environment.json"
            environment = json.loads(_plain(begun)) if begun.exists() else {}
            values["ema"] = environment.get("ema") or 0.0
        return _Unchecked.from_json(values)
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"recipe.json can't be read: {in_one_line(error)}") from error


def read_rows(path: Path, *, every: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The lines from the last measured epoch on, or ``every`` one; and that epoch's."""
    try:
        return _rows(path, path.stat().st_size, every)
    except FileNotFoundError:  # also one that is moved away meanwhile
        return [], None


def _rows(path: Path, size: int, every: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    rows: list[dict[str, Any]] = []
    for most in (size,) if every or size <= _TAIL else (_TAIL, size):
        # The first line of a part of the file is torn, and so may be the last of a run that was killed.
        lines = _plain(path, last=most if most < size else sys.maxsize).split(b"\n")[
            1 if most < size else 0 : -1
        ]
        rows.clear()
        for line in reversed(lines):
            rows.append(_row(line))
            if not every and rows[-1].get("test") is not None:
                break
        if rows and rows[-1].get("test") is not None:
            break
    rows.reverse()
    return rows, next((row for row in reversed(rows) if row.get("test") is not None), None)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        begins = line[:40].decode(errors="replace")
        raise UserError(f"metrics.jsonl is damaged: no JSON in the line {begins!r}") from error
    known = isinstance(row, dict) and type(row.get("epoch")) is int
    if not known or type(row.get("step", 0)) is not int:
        raise UserError("metrics.jsonl is damaged: a line isn't an epoch's")
    return dict(row)


def _plain(path: Path, *, last: int | None = None) -> bytes:
    """The bytes of a regular file, or its ``last``; a pipe or a device isn't waited for.

    Raises:
        OSError: it can't be read.
        UserError: it is no regular file, or too large.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path.name} is no file")
        if last is not None:
            file.seek(max(0, found.st_size - last))
        elif found.st_size > _LARGEST:
            raise UserError(f"{path.name} has {found.st_size:,} bytes")
        return file.read()


def _times_and_bytes(folder: Path) -> tuple[float, int]:
    """When the run last wrote, and the bytes of its files; links aren't followed."""
    modified, sizes = 0.0, {}
    for path, _, names in os.walk(folder):
        inside = os.path.relpath(path, folder)
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))
            except OSError:  # pruned meanwhile
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
            if inside.startswith("checkpoints") or (inside == "." and name in _WRITTEN):
                modified = max(modified, found.st_mtime)
    return modified or os.stat(folder).st_mtime, sum(sizes.values())
