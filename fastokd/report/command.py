"""The command line that trains a run again."""

from __future__ import annotations

import json
import shlex
from typing import Any

from fastokd.errors import UserError
from fastokd.known import METHODS
from fastokd.recipe.changes import NAMED, option
from fastokd.recipe.names import Recipe, recipe
from fastokd.recipe.settings import parse_settings, wanted_runs
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.identity import deciding, source_of
from fastokd.student.teacher import kept_teachers

# Options of the run that the command names, beside those that change its numbers.
OF_THE_RUN = ("precision", "data_root")


def command_of(run: Run) -> str | None:
    """``fastokd train`` with the run's seed and all settings in which its recipe differs from the one of its
    name, as a shell takes it; None if no such command gives exactly this recipe."""
    try:
        flags, settings = _changes(run.recipe)
        again = wanted_runs(run.recipe.name, flags, parse_settings(settings))
        if [wanted.recipe for wanted in again] != [run.recipe]:
            return None
        begun = RunFacts(run.folder).environment()
        options = {**deciding(run.folder), **{name: begun.get(name) for name in OF_THE_RUN}}
        if run.recipe.teacher and (kept := kept_teachers(run.folder)):
            options["teacher"] = [source_of(one) for one in kept]
        ranks = int(begun.get("ranks") or 1)
    except (UserError, TypeError, ValueError):
        return None
    launcher = ["torchrun", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    words = [*launcher, "fastokd", "train", run.recipe.name]
    for name, value in flags.items():
        words += [option(name), str(value)]
    for setting in settings:
        words += ["--set", setting]
    for name, value in options.items():
        words += _option(name, value)
    return shlex.join(words)


def _changes(of: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags, and of ``--set``."""
    flags: dict[str, Any] = {"seed": of.seed}
    if of.method not in METHODS:
        flags["method"] = of.method
    base = recipe(of.name, **flags)
    if of.epochs != base.epochs:
        flags["epochs"] = of.epochs
        base = recipe(of.name, **flags)
    settings = []
    theirs = base.to_json()
    for name, value in of.to_json().items():
        if name in (*NAMED, "seed") or value == theirs[name]:
            continue
        parts = {name: value}
        if name in ("method_options", "model_options"):
            parts = {k: v for k, v in value.items() if v != theirs[name].get(k)}
        settings += [f"{key}={json.dumps(part)}" for key, part in parts.items()]
    return flags, settings


def _option(name: str, value: Any) -> list[str]:
    """An option of a run, as the command line takes it."""
    if value is None or value is False:
        return []
    if value is True:
        return [option(name)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [word for one in values for word in (option(name), str(one))]
