"""Finds runs in folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastokd.errors import UserError, warn
from fastokd.run.folder import Run
from fastokd.run.folders import is_run, run_folders


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs named by ``paths``: run folders, or folders with runs at any depth.

    Runs of a folder are sorted by path. A run below it without a measured epoch is left out with a
    warning.

    Raises:
        UserError: no path; no run, or no run with a measured epoch, in one of them.
    """
    if not paths:
        raise UserError("no run was named: give at least one run folder")
    return [run for path in paths for run in _runs_in(Path(path))]


def _runs_in(path: Path) -> list[Run]:
    if is_run(path):
        return [Run.load(path)]
    folders = run_folders(path)
    if not folders:
        raise UserError(f"there is no run in {path}: name a folder that `fastokd train` left")
    measured = []
    for run in map(Run.load, folders):
        if any("test" in row for row in run.metrics):
            measured.append(run)
        else:
            warn(f"{run.folder} has no measured epoch yet and is left out")
    if not measured:
        raise UserError(f"no run in {path} has a measured epoch yet: train one on with --resume")
    return measured


def find_beside(run: Run, method: str, most: int = 500) -> list[Run]:
    """The other measured runs of ``method`` in the folder that holds ``run``, of the first ``most`` by name.
    Damaged ones and those without a measured epoch are left out."""
    here = run.folder.resolve()
    found: list[Run] = []
    for path in sorted(path for path in here.parent.iterdir() if is_run(path))[:most]:
        with suppress(UserError):
            known = path.is_symlink() and path.resolve().parent == here.parent
            if not known and path != here and _method(path) == method:
                other = Run.load(path)
                found += [other] if any("test" in row for row in other.metrics) else []
    return found


def _method(folder: Path) -> object:
    """The method in a run's ``recipe.json``, whose other fields aren't read."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "recipe.json").read_bytes()).get("method")
    return None
