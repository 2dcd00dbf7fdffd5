"""Removes runs, or the checkpoints of finished ones. Links are never followed.

Files are removed under the run's lock. ``recipe.json`` is removed last, so that a removal that was
interrupted is found again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastokd.checkpoint import FACTS, MANIFEST, STUDENT, TENSORS, checkpoint_step
from fastokd.errors import UserError, in_one_line
from fastokd.host.names import counted
from fastokd.overview.columns import in_bytes
from fastokd.overview.listing import REMOVAL, Listed, look_at, read_rows
from fastokd.run.folders import run_folders
from fastokd.run.lock import FolderLock
from fastokd.run.standing import of_lines

# A checkpoint, and one that a killed writer left.
_CHECKPOINT = re.compile(r"(last|best)-\d+|\.(last|best)-\d+\.(tmp|old)\d+")


@dataclass(frozen=True)
class Asked:
    """What is to be removed; ``older_than``, in seconds since the run last wrote, narrows the rest."""

    checkpoints: bool = False
    unfinished: bool = False
    failed: bool = False
    every: bool = False
    older_than: float = 0.0

    def whole(self, run: Listed) -> bool:
        """Whether the whole run is asked for, unless it is running."""
        if self.every or (self.unfinished and run.state in ("running", "interrupted")):
            return True
        begun = (self.unfinished or self.failed) and _is_begun(run.folder)
        return run.state == "failed" and (self.failed or begun)


@dataclass(frozen=True)
class Removal:
    """The removal of a run, or only of its ``checkpoints`` where there are some; ``bytes`` are freed."""

    run: Listed
    checkpoints: tuple[Path, ...]
    bytes: int

    @property
    def what(self) -> str:
        """In words."""
        return "checkpoints" if self.checkpoints else "the whole run"


def plan(runs: Sequence[Listed], asked: Asked) -> tuple[list[Removal], dict[Path, str]]:
    """What is to be removed, and why a run that was asked for isn't."""
    removals, kept = [], {}
    for run in runs:
        whole = asked.whole(run)
        wanted = whole or (asked.checkpoints and run.state == "finished")
        young = asked.older_than and time.time() - run.modified < asked.older_than
        if not wanted or young:
            continue
        try:
            removals += [_whole(run, every=asked.every)] if whole else _checkpoints(run)
        except UserError as error:
            kept[run.folder] = str(error)
    return removals, kept


def remove(removal: Removal) -> None:
    """Removes it.

    Raises:
        UserError: the run is running, or has changed since it was listed.
        OSError: something can't be removed; the same removal continues it.
    """
    folder = removal.run.folder
    lock = FolderLock(folder)
    try:
        if not lock.take():
            raise UserError("its file system has no locks, so that it may be running")
        now = look_at(folder, locked=False)
        if now is None or (now.state, now.modified) != (removal.run.state, removal.run.modified):
            raise UserError("it has changed since it was listed")
        if removal.checkpoints:
            _remove_checkpoints(removal.checkpoints)
        else:
            _whole(now, every=True)  # another run or a link may have come since
            _remove_whole(folder)
    finally:
        lock.release()


def remove_all(removals: Sequence[Removal]) -> dict[Path, str]:
    """Removes them; returns why a run's folder is still there."""
    left = {}
    for removal in removals:
        try:
            remove(removal)
        except (UserError, OSError) as error:  # noqa: PERF203
            left[removal.run.folder] = in_one_line(error)
    return left


def said(removals: Sequence[Removal]) -> str:
    """How much they are: ``2 runs and the checkpoints of 1 run, 3.1 MB``."""
    whole = sum(not one.checkpoints for one in removals)
    parts = [counted(whole, "run")] if whole else []
    if len(removals) > whole:
        parts.append(f"the checkpoints of {counted(len(removals) - whole, 'run')}")
    return f"{' and '.join(parts) or 'nothing'}, {in_bytes(sum(one.bytes for one in removals))}"


def _whole(run: Listed, *, every: bool) -> Removal:
    """The removal of a whole run. ``every``: also of one that can't be read but has its student.

    Raises:
        UserError: it is running, or no run of fastokd's, or holds another run, or its student.
    """
    folder = run.folder
    if run.state == "running":
        raise UserError("it is running")
    if folder.is_symlink():
        raise UserError("it is a symbolic link: name the folder itself")
    if not _is_own(folder):
        raise UserError("there is no sign that fastokd wrote it: remove it yourself")
    kept = run.state == "failed" and (folder / STUDENT).is_file() and not _is_begun(folder)
    if kept and not every:
        raise UserError(
            f"its {STUDENT} is there, and another version may read it: --all removes it"
        )
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise UserError("it holds the working directory")
    for entry in folder.iterdir():
        if (
            entry.is_dir()
            and not entry.is_symlink()
            and (inside := run_folders(entry, links=False))
        ):
            raise UserError(f"it holds another run, {inside[0]}")
    return Removal(run, (), run.bytes)


def _is_own(folder: Path) -> bool:
    """Whether fastokd wrote a run here, and not only a ``recipe.json``, as others do, too."""
    try:
        facts = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        facts = None
    inside = folder / "checkpoints"
    saved = inside.is_dir() and not inside.is_symlink() and any(_saved_in(inside))
    return _is_begun(folder) or saved or (isinstance(facts, dict) and "fastokd" in facts)


def _saved_in(inside: Path) -> Iterator[Path]:
    """The checkpoints in ``checkpoints/``, leftovers of killed writers first."""
    return (path for path in sorted(inside.iterdir()) if _CHECKPOINT.fullmatch(path.name))


def _is_begun(folder: Path) -> bool:
    """Whether the removal of a run was interrupted."""
    return any(folder.glob(f"{REMOVAL}*"))


def _checkpoints(run: Listed) -> list[Removal]:
    """The removal of a finished run's checkpoints, or nothing where there are none.

    Raises:
        UserError: a link, or files that fastokd didn't write; the run would no longer be finished.
    """
    inside = run.folder / "checkpoints"
    if run.folder.is_symlink() or inside.is_symlink():
        raise UserError("its checkpoints/ is behind a symbolic link")
    found = list(_saved_in(inside)) if inside.is_dir() else []
    sizes = {}
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise UserError(f"{path.name} in its checkpoints/ is no folder")
        for file in path.iterdir():
            status = file.lstat()
            if file.name not in (TENSORS, FACTS, MANIFEST) or not stat.S_ISREG(status.st_mode):
                raise UserError(f"fastokd didn't write {file}")
            sizes[status.st_dev, status.st_ino] = status.st_size
    if found:
        _check_student(run, found)
    return [Removal(run, tuple(found), sum(sizes.values()))] if found else []


def _check_student(run: Listed, saved: Sequence[Path]) -> None:
    """Raises UserError unless the student is of the last step, and the lines say that the run has ended."""
    try:
        with safe_open(run.folder / STUDENT, "np") as file:
            step = int((file.metadata() or {}).get("step", -1))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"its {STUDENT} can't be read: {in_one_line(error)}") from error
    last = max(map(checkpoint_step, saved))
    if step < last:
        raise UserError(f"its {STUDENT} isn't known to be of its last step, {last}")
    rows, _ = read_rows(run.folder / "metrics.jsonl", every=True)
    if of_lines(rows).epochs < (run.epochs or 0):
        raise UserError("only its checkpoints say that it is finished")


def _remove_checkpoints(paths: Sequence[Path]) -> None:
    """Removes checkpoints; each is renamed to a temporary name first."""
    for path in paths:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.tmp{os.getpid()}"))
        for name in (TENSORS, FACTS, MANIFEST):
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _remove_whole(folder: Path) -> None:
    """Removes a run folder, ``recipe.json`` last."""
    mark = folder / f"{REMOVAL}{os.getpid()}"
    mark.touch()
    for entry in folder.iterdir():
        if entry.name == "recipe.json" or entry.name.startswith(REMOVAL):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / "recipe.json").unlink()
    for left in folder.glob(f"{REMOVAL}*"):
        left.unlink()
    folder.rmdir()
