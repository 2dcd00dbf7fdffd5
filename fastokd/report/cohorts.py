"""A cohort's group size and mixing weights, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastokd.report.curves import who
from fastokd.report.pools import Pool
from fastokd.report.statistics import Sample
from fastokd.report.tables import Cell, Column, Table


class Mixing(NamedTuple):
    """Mean mixing weights on the test split, ``weights_ER``, of the epochs (from 1) that were measured and of R
    pairs of a receiver and its source; pairs whose weight is always 0 are left out."""

    pool: Pool
    epochs: list[int]
    names: list[str]
    weights_ER: Any


def mixing_of(pools: Sequence[Pool]) -> list[Mixing]:
    """Of each pool that has such weights."""
    found = []
    for pool in pools:
        by_epoch: dict[int, list[Any]] = {}
        for row in (row for run in pool.runs for row in run.metrics):
            if "attention" in row.get("test", {}):
                by_epoch.setdefault(row["epoch"] + 1, []).append(row["test"]["attention"])
        if by_epoch:
            epochs = sorted(by_epoch)
            weights_ESN = np.stack([np.mean(by_epoch[epoch], axis=0) for epoch in epochs])
            heard_SN = weights_ESN.any(0)
            names = [f"{who(pool, s)} from {n}" for s, n in np.argwhere(heard_SN)]
            found.append(Mixing(pool, epochs, names, weights_ESN[:, heard_SN]))
    return found


def mixing_table(pools: Sequence[Pool]) -> Table:
    """A row an epoch of each pool, a column a pair."""
    found = mixing_of(pools)
    names = list(dict.fromkeys(name for mixing in found for name in mixing.names))
    rows: list[tuple[Cell, ...]] = []
    for mixing in found:
        for epoch, weights_R in zip(mixing.epochs, mixing.weights_ER.tolist(), strict=True):
            of = dict(zip(mixing.names, weights_R, strict=True))
            cells = [f"{of[name]:.4f}" if name in of else "" for name in names]
            rows.append((mixing.pool.label, epoch, *cells))
    columns = (Column("recipe", text=True), Column("epoch"), *map(Column, names))
    return Table("attention-numbers", "mixing weights on test", columns, tuple(rows))


class Sizes(NamedTuple):
    """Top-1 errors of a method's pools after the last epoch, in %, by the number of networks."""

    label: str
    errors: dict[int, Sample]


def sizes_of(pools: Sequence[Pool]) -> list[Sizes]:
    """Of the methods with at least two sizes."""
    by_method: dict[str, dict[int, Sample]] = {}
    for pool in pools:
        recipe, last = pool.recipe, pool.last()
        key = f"{recipe.method}-{recipe.sharing}, {recipe.model}, {recipe.dataset}"
        other = pool.label.removeprefix(recipe.name).replace(f" students={recipe.students}", "")
        of = by_method.setdefault(key + other, {})
        of[recipe.students] = Sample(100 - last.mean, last.std, last.runs)
    return [
        Sizes(label, dict(sorted(errors.items())))
        for label, errors in by_method.items()
        if len(errors) > 1
    ]


def sizes_table(pools: Sequence[Pool]) -> Table:
    """A row a method and size."""
    rows = tuple(
        (sizes.label, size, error, error.runs)
        for sizes in sizes_of(pools)
        for size, error in sizes.errors.items()
    )
    columns = (
        Column("method", text=True),
        Column("networks"),
        Column("top-1 error (%)"),
        Column("runs"),
    )
    return Table("group_size-numbers", "error by the number of networks", columns, rows)
