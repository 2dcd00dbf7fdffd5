"""The cells of both papers' tables: which recipe each is, and what was published for it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fastokd.errors import unknown_name

# The facts' columns as our methods; the form where the method has two and none was published alone.
METHODS = {"okddip_network": "okddip-network", "okddip_branch": "okddip-branch"}
GROUP_SIZES = range(3, 9)
DEFAULT_SIZE = 4


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        table, row, column: where it stands.
        recipe: what trains it.
        unit: ``"error"`` or ``"accuracy"``, top-1 in %.
        mean: as published; None where a figure shows it and no number is printed.
        std: over ``runs`` runs; None for a single run.
    """

    table: str
    row: str
    column: str
    recipe: str
    unit: str = "error"
    mean: float | None = None
    std: float | None = None
    runs: int = 0


def tables() -> list[str]:
    """The names that :func:`cells_of` takes."""
    return list(_all())


def cells_of(table: str) -> list[Cell]:
    """The cells of one table, row by row; an unknown name raises and offers the nearest ones."""
    if table not in _all():
        raise unknown_name("table", table, _all())
    return _all()[table]


def published_recipes() -> list[str]:
    """Every cell's recipe, each once."""
    return list(dict.fromkeys(cell.recipe for cells in _all().values() for cell in cells))


@cache
def _all() -> dict[str, list[Cell]]:
    text = resources.files("fastokd.facts").joinpath("paper_results.json").read_text()
    facts = json.loads(text)
    okddip = facts["okddip"]
    return {
        "table1": _methods("table1", okddip["table1_cifar10"], "cifar10"),
        "table2": _methods("table2", okddip["table2_cifar100"], "cifar100"),
        "table3": _methods("table3", {"resnet34": okddip["table3_imagenet_resnet34"]}, "imagenet"),
        "table4": _ensembles(okddip["table4_cifar100_ensemble_branch"]),
        "table5": _ablations(okddip["table5_ablation_cifar100_resnet32"]),
        "table6": _teachers(okddip["table6_teacher_resnet32"]),
        "figure3": _group_sizes(),
        "ffsd": _ffsd(facts["ffsd"]),
    }


def _cell(table: str, row: str, column: str, recipe: str, published: Any) -> Cell:
    """A number alone is a single run; a pair a mean and a deviation over three."""
    if isinstance(published, (int, float)):
        return Cell(table, row, column, recipe, mean=float(published), runs=1)
    mean, std = published
    return Cell(table, row, column, recipe, mean=mean, std=std, runs=3)


def _methods(table: str, rows: dict[str, dict[str, Any]], dataset: str) -> list[Cell]:
    return [
        _cell(table, model, column, f"{METHODS.get(column, column)}/{model}/{dataset}", value)
        for model, columns in rows.items()
        for column, value in columns.items()
    ]


def _ensembles(rows: dict[str, dict[str, Any]]) -> list[Cell]:
    """Table 4 has 4 peers and no leader: OKDDip's column is its form without one."""
    methods = {"okddip": "okddip_no_two_level-branch"}
    return [
        _cell(
            "table4",
            model,
            column,
            f"{methods.get(column, column)}-ensemble/{model}/cifar100",
            value,
        )
        for model, columns in rows.items()
        for column, value in columns.items()
    ]


def _ablations(columns: dict[str, Any]) -> list[Cell]:
    return [
        _cell(
            "table5",
            "resnet32",
            column,
            f"{column if column == 'okddip' else f'okddip_{column}'}-branch/resnet32/cifar100",
            value,
        )
        for column, value in columns.items()
    ]


def _teachers(rows: dict[str, dict[str, Any]]) -> list[Cell]:
    recipes = {
        "baseline": "baseline/resnet32",
        "kd": "kd/resnet32",
        "okddip": "okddip-branch/resnet32",
        "okddip_kd": "okddip_kd-branch/resnet32",
        "teacher_resnet110": "baseline/resnet110",
    }
    return [
        _cell("table6", dataset, column, f"{recipes[column]}/{dataset}", value)
        for dataset, columns in rows.items()
        for column, value in columns.items()
    ]


def _group_sizes() -> list[Cell]:
    """Figure 3 plots three methods over the number of branches; it prints no numbers."""
    return [
        Cell(
            "figure3",
            f"{size} branches",
            column,
            f"{method}{'' if size == DEFAULT_SIZE else f'@{size}'}/resnet32/cifar100",
        )
        for size in GROUP_SIZES
        for column, method in (("cl_ilr", "cl_ilr"), ("one", "one"), ("okddip", "okddip-branch"))
    ]


def _ffsd(facts: dict[str, Any]) -> list[Cell]:
    """Accuracies of single runs; where there are three, their mean and deviation."""
    return [
        Cell(
            "ffsd",
            model,
            dataset,
            f"ffsd/{model}/{dataset}",
            "accuracy",
            statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )
        for dataset in ("cifar100", "imagenet")
        for model, values in facts[dataset].items()
    ]
