"""``make demo``: groups against the same student alone, on scikit-learn's digits with right and wrong labels."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastokd.data import DatasetSplits, Split, load_dataset
from fastokd.errors import UserError
from fastokd.host.console import console
from fastokd.host.names import counted
from fastokd.host.streams import open_missing, say
from fastokd.recipe.names import Recipe, recipe
from fastokd.recipe.settings import parse_seeds
from fastokd.report.page import report
from fastokd.report.statistics import Sample, paired
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.train import train

ALONE = "baseline/resnet8/digits"


@dataclass(frozen=True)
class Case:
    """A group, trained with ``changes`` of its recipe as the same student alone is."""

    name: str
    recipe: str
    changes: dict[str, Any]


# One network learns the right labels as well. Wrong ones it learns by heart, which a group does later: a case that
# docs/results.md has with all 500 digits, here with half of them, for time.
CASES = (
    Case("okddip", "okddip-branch/resnet8/digits", {"epochs": 45}),
    Case(
        "wrong-labels",
        "dml@2/resnet8/digits",
        {"epochs": 60, "label_noise": 0.4, "fraction": 0.5, "batch_size": 32},
    ),
)


def main() -> None:
    """Trains each group and the same student alone for each seed; prints the tables."""
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
    wanted = []
    for case in CASES:
        chosen = case.changes | ({"epochs": arguments.epochs} if arguments.epochs else {})
        for name, folder in ((case.recipe, case.name), (ALONE, f"{case.name}-alone")):
            wanted += [
                (recipe(name, seed=seed, **chosen), out / f"{folder}-seed{seed}") for seed in seeds
            ]
    with _pool() as pool:
        runs = pool.map(_trained, *zip(*wanted, strict=True))
        for _ in CASES:
            group, alone = (list(itertools.islice(runs, len(seeds))) for _ in range(2))
            console().print(_table(group, alone))
    say("among wrong labels a network alone is better after half the epochs: docs/results.md")
    page = report([folder for _, folder in wanted], out / "report.html")
    say(f"{time.perf_counter() - started:.0f} s in all; the runs are in {out}, plotted in {page}")


def _pool() -> ProcessPoolExecutor:
    """On a CPU one process for each core, since so small a network gains nothing from two."""
    cores = len(os.sched_getaffinity(0))
    processes = 1 if torch.cuda.is_available() else cores
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (cores // processes,))


def _trained(wanted: Recipe, folder: Path) -> Run:
    wrong = f", {wanted.label_noise:.0%} of the labels wrong" * (wanted.label_noise > 0)
    say(f"{wanted.name}, seed {wanted.seed}{wrong}")
    return train(wanted, RunOptions(out=folder, eval_every=30, engine="loop", quiet=True))


def nearest_neighbours(data: DatasetSplits, k: int = 3) -> float:
    """Test accuracy of k-nearest-neighbours on raw pixels."""
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    train, test = (split.images_NHWC.flatten(1).double() for split in (data.train, data.test))
    nearest = torch.cdist(test, train).topk(k, largest=False).indices
    votes = data.train.labels_N[nearest].mode(dim=1).values
    return (votes == data.test.labels_N).double().mean().item()


def _table(group: list[Run], alone: list[Run]) -> Table:
    ours = group[0].recipe
    wrong = f", {ours.label_noise:.0%} of their labels wrong" * (ours.label_noise > 0)
    table = Table(
        title=f"{ours.name}: {ours.fraction:.0%} of 500 digits to train{wrong}; epoch {ours.epochs}, 1,000 test images, "
        f"{counted(len(group), 'seed')}"
    )
    table.add_column("")
    table.add_column("test top-1 (%)", justify="right")
    tests = [run.last["test"] for run in group]

    def row(name: str, fractions: list[float]) -> None:
        table.add_row(name, str(Sample.of([100 * value for value in fractions])))

    kept = "mean"
    if ours.reported == "leader":
        kept = "leader"
        row("leader", [test["leader_top1"] for test in tests])
    for peer in range(len(tests[0]["student_top1"]) - (kept == "leader")):
        row(f"peer {peer}", [test["student_top1"][peer] for test in tests])
    row(f"mean of all {ours.students}", [test["mean_top1"] for test in tests])
    row("ensemble of the peers", [test["ensemble_top1"] for test in tests])
    row("the same student alone", [run.last["test"]["mean_top1"] for run in alone])
    if not wrong:
        neighbours = nearest_neighbours(load_dataset("digits", None))
        table.add_row("3 nearest neighbours, raw pixels", f"{100 * neighbours:.2f}")
    table.add_section()
    top1 = ([100 * summarise(run).last for run in runs] for runs in (group, alone))
    table.add_row(f"{kept} less alone, 95% interval", str(paired(*top1).difference))
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
