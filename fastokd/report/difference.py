"""The differences of two runs: recipe, versions, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.summary import summarise


def diff_runs(first: str | Path, second: str | Path) -> dict[str, dict[str, list[Any]]]:
    """``{"recipe": {name: [first, second]}, "environment": ..., "results": ...}``.

    Recipe and environment contain only differences. Results contain both runs' reported accuracy,
    last and best epoch.

    Raises:
        UserError: a folder is no run, or has no measured epoch.
    """
    runs = [Run.load(Path(first)), Run.load(Path(second))]
    recipes = [run.recipe.to_json() for run in runs]
    return {
        "recipe": _differing(*recipes),
        "environment": _differing(*(RunFacts(run.folder).environment() for run in runs)),
        "results": _both(*(_results(run) for run in runs)),
    }


def _results(run: Run) -> dict[str, Any]:
    found = summarise(run)
    last = next(row for row in reversed(run.metrics) if "test" in row)["test"]
    return {
        "reported": found.reported,
        "last epoch": found.last_epoch,
        "whole epochs": run.standing.epochs,
        "steps": run.standing.step,
        "last test top-1": found.last,
        "best epoch": found.best_epoch,
        "best test top-1": found.best,
        "best epoch chosen on": found.best_on,
        "ensemble test top-1": last["ensemble_top1"] if run.recipe.students > 1 else None,
        "test diversity": last["diversity"],
        "seconds": round(run.seconds, 1),
    }


def _both(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [ours.get(name), theirs.get(name)] for name in {**ours, **theirs}}


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: pair for name, pair in _both(ours, theirs).items() if pair[0] != pair[1]}
