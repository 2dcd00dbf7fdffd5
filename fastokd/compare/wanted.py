"""The runs of a comparison: each contestant under each condition with each seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.compare.contestants import Contestant, Request
from fastokd.data import DatasetSplits
from fastokd.data.reduced import chosen
from fastokd.methods import method_class
from fastokd.recipe.names import Recipe
from fastokd.recipe.settings import RATES, WantedRun
from fastokd.run.options import RunOptions


@dataclass(frozen=True)
class Condition:
    """A training set: a share of its images, and the share of wrong labels."""

    fraction: float = 1.0
    label_noise: float = 0.0

    @property
    def title(self) -> str:
        """For a heading."""
        if self.label_noise:
            return f"label noise {100 * self.label_noise:g}%"
        return (
            "whole training set"
            if self.fraction == 1
            else f"{100 * self.fraction:g}% of the images"
        )

    @property
    def word(self) -> str:
        """In a folder's name."""
        if self.label_noise:
            return f"-noise{self.label_noise!r}"
        return "" if self.fraction == 1 else f"-fraction{self.fraction!r}"


WHOLE = Condition()


@dataclass(frozen=True)
class Entry:
    """A run: whose, under which condition, with which seed.

    Attributes:
        images: training images that it sees in all.
        macs: multiply-accumulates that its training spends.
        taught_by: the folder of the teacher's run in the comparison.
    """

    contestant: Contestant
    condition: Condition
    seed: int
    run: WantedRun
    images: int
    macs: int
    taught_by: str | None = None

    def options(self, options: RunOptions, out: Path, base: Recipe) -> RunOptions:
        """The run's options: as many evaluations as a run of the ``base`` recipe, and its teacher."""
        rarer = max(1, options.eval_every * self.run.recipe.epochs // base.epochs)
        teacher = options.teacher if self.taught_by is None else (str(out / self.taught_by),)
        return dataclasses.replace(
            options,
            out=out / self.run.folder,
            teacher=teacher if has_teacher(self.run.recipe) else (),
            eval_every=min(rarer, self.run.recipe.epochs),
        )


def conditions_of(asked: Request) -> list[Condition]:
    """The whole training set first, then those of the switches in ascending order."""
    noisy = [Condition(label_noise=share) for share in sorted(asked.label_noise) if share]
    few = [Condition(fraction=share) for share in sorted(asked.fraction) if share != 1]
    return [WHOLE, *noisy, *few]


def entries(asked: Request, rows: Sequence[Contestant], data: DatasetSplits) -> list[Entry]:
    """Every run, seed by seed, so that an unfinished comparison has whole pairs; teachers come before
    their students.

    Raises:
        UserError: a condition that the data don't allow.
    """
    conditions = conditions_of(asked)
    teachers = [row for row in rows if row.kind == "teacher"]
    others = [row for row in rows if row.kind != "teacher"]
    found: dict[str, Entry] = {}
    for seed in asked.seeds:
        for condition in conditions:
            # One teacher serves all seeds, unless the seed decides on what it is trained.
            of_teacher = others[0].recipe.seed if condition == WHOLE else seed
            made = {row.label: _entry(row, condition, of_teacher, data, None) for row in teachers}
            for entry in made.values():
                found.setdefault(entry.run.folder, entry)
            for row in others:
                taught_by = made[row.taught_by].run.folder if row.taught_by else None
                entry = _entry(row, condition, seed, data, taught_by)
                found[entry.run.folder] = entry
    return list(found.values())


def _entry(
    row: Contestant, condition: Condition, seed: int, data: DatasetSplits, taught_by: str | None
) -> Entry:
    settings: dict[str, Any] = {
        "fraction": condition.fraction,
        "label_noise": condition.label_noise,
    }
    changed = dataclasses.replace(row.recipe, seed=seed, **settings)
    images = len(data.train)
    if condition.fraction < 1:
        images = len(chosen(data.train.labels_N.cpu(), condition.fraction, seed))
        changed = _on_few_images(changed, images, len(data.train))
    # Batches of whole classes leave out an epoch's last part.
    left = images % changed.batch_size if changed.images_per_class else 0
    seen = changed.epochs * (images - left)
    folder = f"{_slug(row)}{condition.word}-seed{seed}"
    run = WantedRun(folder, changed, {**settings, "seed": seed})
    return Entry(row, condition, seed, run, seen, row.macs * seen, taught_by)


def _on_few_images(of: Recipe, images: int, whole: int) -> Recipe:
    """As many images seen as with the whole set, so more epochs. A batch has at most all images; its
    learning rates are then scaled in proportion (Goyal et al., arXiv 1706.02677)."""
    of = of.with_epochs(max(1, round(of.epochs * whole / images)))
    if images >= of.batch_size:
        return of
    share = images / of.batch_size
    return dataclasses.replace(
        of, batch_size=images, **{rate: share * getattr(of, rate) for rate in RATES}
    )


def _slug(row: Contestant) -> str:
    """The first part of a run's folder."""
    if row.kind == "method":
        return row.label
    what = {"alone": "alone", "longer": f"alone-{row.recipe.epochs}epochs"}
    return what.get(row.kind, f"{row.kind}-{row.recipe.model.replace(':', '-')}")


def has_teacher(of: Recipe) -> bool:
    """Whether the recipe's method learns from a trained teacher."""
    return method_class(of.method).needs.teacher
