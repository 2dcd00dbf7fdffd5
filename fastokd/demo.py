"""``make demo``: OKDDip against a single student and nearest neighbours, on scikit-learn's digits."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from rich.table import Table

from fastokd.data import DatasetSplits, Split, load_dataset
from fastokd.errors import UserError
from fastokd.host.console import console
from fastokd.host.names import counted
from fastokd.host.streams import open_missing, say
from fastokd.recipe.names import recipe
from fastokd.recipe.settings import parse_seeds
from fastokd.report.page import report
from fastokd.report.statistics import Sample
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.train import train

RECIPES = {"okddip": "okddip-branch/resnet8/digits", "alone": "baseline/resnet8/digits"}


def main() -> None:
    """Trains OKDDip and the same student alone for each seed; prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m fastokd.demo",
        description=main.__doc__,
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--epochs", type=int, default=None)
    arguments = parser.parse_args()
    seeds = parse_seeds(arguments.seeds)
    out = _unused(arguments.out)

    started = time.perf_counter()
    runs: dict[str, list[Run]] = {kind: [] for kind in RECIPES}
    for seed in seeds:
        for kind, name in RECIPES.items():
            resolved = recipe(name, seed=seed, epochs=arguments.epochs or recipe(name).epochs)
            say(f"{name}, seed {seed}")
            options = RunOptions(out=out / f"{kind}-seed{seed}", eval_every=5, engine="loop")
            runs[kind].append(train(resolved, options))

    neighbours = nearest_neighbours(load_dataset("digits", None))
    console().print(_table(runs, neighbours))
    folders = [run.folder for of_kind in runs.values() for run in of_kind]
    page = report(folders, out / "report.html")
    say(f"{time.perf_counter() - started:.0f} s in all; the runs are in {out}, plotted in {page}")


def nearest_neighbours(data: DatasetSplits, k: int = 3) -> float:
    """Test accuracy of k-nearest-neighbours on raw pixels."""
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    train, test = (split.images_NHWC.flatten(1).double() for split in (data.train, data.test))
    nearest = torch.cdist(test, train).topk(k, largest=False).indices
    votes = data.train.labels_N[nearest].mode(dim=1).values
    return (votes == data.test.labels_N).double().mean().item()


def _table(runs: dict[str, list[Run]], neighbours: float) -> Table:
    count = len(runs["okddip"])
    table = Table(
        title=f"digits: 500 to train, last epoch, 1,000 test images, {counted(count, 'seed')}"
    )
    table.add_column("")
    table.add_column("test top-1 (%)", justify="right")
    tests = [run.last["test"] for run in runs["okddip"]]

    def row(name: str, fractions: list[float]) -> None:
        table.add_row(name, str(Sample.of([100 * value for value in fractions])))

    row("leader", [test["leader_top1"] for test in tests])
    for peer in range(len(tests[0]["student_top1"]) - 1):
        row(f"peer {peer}", [test["student_top1"][peer] for test in tests])
    row("mean of all four", [test["mean_top1"] for test in tests])
    row("ensemble of the peers", [test["ensemble_top1"] for test in tests])
    row("the same student alone", [run.last["test"]["mean_top1"] for run in runs["alone"]])
    table.add_row("3 nearest neighbours, raw pixels", f"{100 * neighbours:.2f}")
    table.add_section()
    diversity = Sample.of([test["diversity"] for test in tests])
    table.add_row("diversity of the peers", diversity.text(4))
    return table


def _unused(out: Path) -> Path:
    """``out``, or ``out-2``, ``out-3`` and so on: the first that doesn't exist."""
    others = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([out], others) if not path.exists())


if __name__ == "__main__":
    open_missing()
    try:
        main()
    except UserError as error:
        sys.exit(f"fastokd: {error}")
