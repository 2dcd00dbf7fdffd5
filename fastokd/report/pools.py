"""Pools: runs of one recipe with several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastokd.errors import UserError
from fastokd.host.names import counted
from fastokd.recipe.names import Recipe
from fastokd.report.published import Changes, from_its_name, options_of, shown
from fastokd.report.statistics import Sample
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.summary import summarise

# One line of metrics.jsonl.
EpochMetrics = dict[str, Any]
# Options that a label names only if pools of the same recipe differ in them.
UNSAID = ("precision", "eval_every")


@dataclass(frozen=True)
class Pool:
    """Runs that differ only in their seeds (and the machine), and their label.

    ``recipe`` is the first run's.
    """

    label: str
    recipe: Recipe
    runs: tuple[Run, ...]

    def curve(
        self, value: Callable[[EpochMetrics], float | None]
    ) -> tuple[list[int], list[float], list[float]]:
        """Epochs (from 1), and the mean and deviation over the runs of ``value`` in each.

        An epoch counts only if every run has a value.
        """
        found: dict[int, list[float]] = {}
        for row in (row for run in self.runs for row in run.metrics):
            if (number := value(row)) is not None:
                found.setdefault(row["epoch"] + 1, []).append(number)
        epochs = sorted(epoch for epoch, values in found.items() if len(values) == len(self.runs))
        samples = [Sample.of(found[epoch]) for epoch in epochs]
        return epochs, [s.mean for s in samples], [s.std or 0.0 for s in samples]

    @property
    def reported(self) -> str:
        """Whose accuracy is reported."""
        return summarise(self.runs[0]).reported

    @property
    def epochs(self) -> int:
        """Whole epochs that every run has."""
        return min(run.standing.epochs for run in self.runs)

    @property
    def best_on(self) -> str:
        """The split that the best epochs were chosen on."""
        return " and ".join(dict.fromkeys(summarise(run).best_on for run in self.runs))

    @property
    def has_leader(self) -> bool:
        """Whether the last student is a leader. It is read from the metrics, which need no code of the
        user's method."""
        rows = (row["test"] for row in self.runs[0].metrics if "test" in row)
        return any(row.get("leader_top1") is not None for row in rows)

    @property
    def folders(self) -> str:
        """The runs' folders, as a shell takes them: ``runs/sweep/dml-seed{0,1}``."""
        return _in_braces([str(run.folder) for run in self.runs])

    def last(self) -> Sample:
        """The reported test accuracy after the last epoch, in %."""
        return Sample.of([100 * summarise(run).last for run in self.runs])

    def best(self) -> Sample:
        """The reported test accuracy of the best epoch, in %."""
        return Sample.of([100 * summarise(run).best for run in self.runs])

    def of_last(self, value: Callable[[EpochMetrics], float | None]) -> Sample | None:
        """``value`` of the last measured epoch; None if a run has none."""
        rows = [[row for row in run.metrics if "test" in row][-1] for run in self.runs]
        values = [number for row in rows if (number := value(row)) is not None]
        return Sample.of(values) if len(values) == len(self.runs) else None


def numbers_of(pools: Sequence[Pool]) -> tuple[tuple[int, ...], ...]:
    """The numbers of each pool's runs, from 0 through all pools."""
    numbers = itertools.count()
    return tuple(tuple(next(numbers) for _ in pool.runs) for pool in pools)


def pool_runs(runs: Sequence[Run]) -> list[Pool]:
    """Pools runs with the same recipe and options except the seed, in the given order. Incomplete
    runs are pooled separately, and so are the runs of each parent folder if they repeat a seed.

    Raises:
        UserError: a run has no measured epoch yet; two runs of one parent folder are the same.
    """
    together: list[tuple[_What, list[Run]]] = []
    for run in runs:
        summarise(run)
        what = _What.of(run)
        group = next((group for known, group in together if known == what), None)
        if group is None:
            together.append((what, [run]))
        else:
            group.append(run)
    kinds = [what for what, _ in together]
    return [
        Pool(_label(what, kinds, members) + where, members[0].recipe, tuple(members))
        for what, group in together
        for where, members in _without_repeats(group)
    ]


def _without_repeats(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one recipe, split by their parent folders if a seed occurs twice; and what to add to the
    label of each."""
    if len({run.recipe.seed for run in runs}) == len(runs):
        return [("", [*runs])]
    by_parent: dict[Path, dict[int, Run]] = {}
    for run in runs:
        seeds = by_parent.setdefault(run.folder.parent, {})
        other = seeds.setdefault(run.recipe.seed, run)
        if other is not run:
            raise UserError(
                f"{run.folder} and {other.folder} are the same recipe with the same "
                "seed: name one of them, or compare them by `fastokd diff`"
            )
    return [(f" in {parent}", [*seeds.values()]) for parent, seeds in by_parent.items()]


def _in_braces(names: Sequence[str]) -> str:
    """Names that differ in one part, with that part in braces."""
    if len(names) == 1:
        return names[0]
    head = _common_start(names)
    rest = [name[len(head) :] for name in names]
    tail = _common_start([name[::-1] for name in rest])[::-1]
    middles = [name[: len(name) - len(tail)] for name in rest]
    return f"{head}{{{','.join(middles)}}}{tail}"


def _common_start(names: Sequence[str]) -> str:
    """Letter by letter; a number isn't cut."""
    return os.path.commonprefix(names).rstrip("0123456789.")  # noqa: RUF071


@dataclass(frozen=True)
class _What:
    """What the runs of a pool have in common."""

    recipe: Recipe
    options: Changes
    whole: bool

    @staticmethod
    def of(run: Run) -> _What:
        options = options_of(run)
        if "init" in options:  # each seed may begin from other weights
            options["init"] = ("trained weights", None)
        precision = RunFacts(run.folder).environment().get("precision")
        options["precision"] = (precision, None)
        return _What(dataclasses.replace(run.recipe, seed=0), options, run.is_whole)

    @cached_property
    def changes(self) -> Changes:
        """The settings in which these runs differ from the recipe of their name."""
        return from_its_name(self.recipe) | self.options


def _label(what: _What, kinds: Sequence[_What], runs: Sequence[Run]) -> str:
    """A recipe's name, and the settings in which the runs differ from it or from other pools."""
    alike = [kind for kind in kinds if kind.recipe.name == what.recipe.name]
    names = dict.fromkeys(name for kind in alike for name in kind.changes)
    ours = dataclasses.asdict(what.recipe) | what.recipe.method_options
    words = [what.recipe.name]
    for name in names:
        values = [kind.changes.get(name) for kind in alike]
        value = what.changes.get(name, (ours.get(name), None))
        if name not in UNSAID or any(other != values[0] for other in values):
            words += shown({name: value})
    if not what.whole:
        epochs = min(run.standing.epochs for run in runs)
        words.append(f"({epochs} of {counted(what.recipe.epochs, 'epoch')})")
    return " ".join(words)
