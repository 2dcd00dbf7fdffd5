"""The cells of both papers' tables: the recipe and the published number of each."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fastokd.errors import unknown_name

_FORMS = {"okddip_network": "okddip-network", "okddip_branch": "okddip-branch"}
# For each of OKDDip's tables: its key in paper_results.json, its row if it has only one, the recipe
# of (method, row), and the methods whose columns have another name.
TABLES: dict[str, tuple[str, str | None, str, dict[str, str]]] = {
    "table1": ("table1_cifar10", None, "{}/{}/cifar10", _FORMS),
    "table2": ("table2_cifar100", None, "{}/{}/cifar100", _FORMS),
    "table3": ("table3_imagenet_resnet34", "resnet34", "{}/{}/imagenet", _FORMS),
    "table4": (
        "table4_cifar100_ensemble_branch",
        None,
        "{}-ensemble/{}/cifar100",
        {"okddip": "okddip_no_two_level-branch"},  # 4 peers and no leader
    ),
    "table5": (
        "table5_ablation_cifar100_resnet32",
        "resnet32",
        "{}-branch/{}/cifar100",
        {
            "random": "okddip_random",
            "symmetric": "okddip_symmetric",
            "entropy": "okddip_entropy",
            "mean": "okddip_mean",
            "no_two_level": "okddip_no_two_level",
        },
    ),
    "table6": (
        "table6_teacher_resnet32",
        None,
        "{}/{}",
        {
            "baseline": "baseline/resnet32",
            "kd": "kd/resnet32",
            "okddip": "okddip-branch/resnet32",
            "okddip_kd": "okddip_kd-branch/resnet32",
            "teacher_resnet110": "baseline/resnet110",
        },
    ),
}
GROUP_SIZES = range(3, 9)
DEFAULT_SIZE = 4


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        table, row, column: its place.
        recipe: the name of the recipe that trains it.
        unit: ``"error"`` or ``"accuracy"``, top-1 in %.
        mean: as published; None if it is only plotted in a figure.
        std: over ``runs`` runs; None for a single run.
        source: where the number is published, if not in the two papers.
    """

    table: str
    row: str
    column: str
    recipe: str
    unit: str = "error"
    mean: float | None = None
    std: float | None = None
    runs: int = 0
    source: str = ""


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
    cells = {}
    for table, (key, row, name, methods) in TABLES.items():
        rows = {row: okddip[key]} if row else okddip[key]
        cells[table] = [
            Cell(
                table, row, column, name.format(methods.get(column, column), row), **_result(value)
            )
            for row, columns in rows.items()
            for column, value in columns.items()
        ]
    return cells | {"figure3": _group_sizes(), "ffsd": _ffsd(facts["ffsd"])} | _newer()


def _newer() -> dict[str, list[Cell]]:
    """The numbers of the methods after the two papers, a table for each method."""
    text = resources.files("fastokd.facts").joinpath("newer_results.json").read_text()
    return {
        method: [Cell(method, **{"unit": "accuracy", **cell}) for cell in cells]
        for method, cells in json.loads(text).items()
    }


def _result(published: Any) -> dict[str, Any]:
    """A number alone is a single run; a pair is a mean and a deviation over three."""
    if isinstance(published, (int, float)):
        return {"mean": float(published), "runs": 1}
    return {"mean": published[0], "std": published[1], "runs": 3}


def _group_sizes() -> list[Cell]:
    """Figure 3 plots three methods over the number of branches, without numbers."""
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
    """Accuracies of single runs, or mean and deviation of three."""
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
