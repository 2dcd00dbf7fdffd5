"""Trains the runs behind the first part of docs/results.md: where distillation helps, and where it doesn't.

    OMP_NUM_THREADS=1 python docs/where_it_helps.py

Several processes may run, one per core, each with its own ``--seeds`` or ``--only``.

A setting is a data set with few images or wrong labels, a network and a number of epochs. Each has three networks
trained alone (for the epochs of the groups, for half and for twice as many) and the methods of SETTINGS. The settings and
methods were chosen by runs of seeds 10 to 19; the page makes its claims of each setting's seeds, which chose nothing.

Each finished run adds a line to docs/where_it_helps/SETTING.jsonl; the missing ones are trained, and a killed run
continues. docs/results_page.py writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastokd.recipe.names import Recipe, recipe
from fastokd.recipe.settings import parse_seeds
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.run.sweep import run_or_resume
from fastokd.train import train

KEPT = Path(__file__).parent / "where_it_helps"
SEEDS = (0, 1, 2, 3, 4)
# Trained alone, by the share of the groups' epochs.
ALONE = {"alone": 1.0, "alone, half the epochs": 0.5, "alone, twice the epochs": 2.0}
OPTIONS = RunOptions(
    device="cpu", precision="bf16", engine="loop", save_every_minutes=2.0, quiet=True
)


@dataclass(frozen=True)
class Setting:
    """``title``: in words; ``methods``: beginnings of recipes' names; ``changes``: of the recipe."""

    title: str
    dataset: str
    model: str
    epochs: int
    methods: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = SEEDS

    @property
    def rows(self) -> tuple[str, ...]:
        return *ALONE, *self.methods

    def recipe(self, row: str, seed: int) -> Recipe:
        """Of a row, at a seed, which also draws the images and the wrong labels."""
        epochs = round(self.epochs * ALONE.get(row, 1.0))
        method = "baseline" if row in ALONE else row
        name = f"{method}/{self.model}/{self.dataset}"
        return recipe(name, epochs=epochs, seed=seed, **self.changes)


SETTINGS = {
    "digits": Setting(
        "500 digits",
        "digits",
        "resnet8",
        30,
        ("dml@2", "okddip-branch"),
    ),
    "digits-noise40": Setting(
        "500 digits, 40% of the labels wrong",
        "digits",
        "resnet8",
        30,
        ("dml@2", "one", "okddip-branch", "okddip-network", "ffsd"),
        {"label_noise": 0.4},
    ),
    # Whether the differences of about a point, unclear with five seeds, are there.
    "digits-noise40-again": Setting(
        "500 digits, 40% of the labels wrong, 20 other seeds",
        "digits",
        "resnet8",
        30,
        ("dml@2",),
        {"label_noise": 0.4},
        range(20, 40),
    ),
    "digits-noise40-longer": Setting(
        "500 digits, 40% of the labels wrong, twice the epochs",
        "digits",
        "resnet8",
        60,
        ("dml@2", "okddip-branch"),
        {"label_noise": 0.4},
    ),
    "fashion-mnist": Setting(
        "1,020 images of Fashion-MNIST",
        "fashion_mnist",
        "resnet8",
        40,
        ("dml@2", "okddip-branch", "okddip-network"),
        {"fraction": 0.017, "batch_size": 64},
    ),
    "glyphs": Setting(
        "744 glyphs, tested on fonts of other families",
        "glyphs",
        "resnet8",
        40,
        ("dml@2", "okddip-branch"),
        {"fraction": 0.02, "batch_size": 64},
    ),
}


def read(setting: str) -> list[dict[str, Any]]:
    """The finished runs of a setting."""
    path = KEPT / f"{setting}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def missing(only: str, row: str, seeds: list[int] | None) -> Iterator[tuple[str, str, int]]:
    """The runs that aren't stored yet, setting by setting and seed by seed."""
    for name, setting in SETTINGS.items():
        if only not in ("", name):
            continue
        done = {(run["row"], run["seed"]) for run in read(name)}
        wanted = [
            (one, seed)
            for seed in setting.seeds
            if seeds is None or seed in seeds
            for one in setting.rows
        ]
        yield from ((name, *one) for one in wanted if row in one[0] and one not in done)


def main() -> None:
    """Trains the missing runs one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="", help="some of each setting's, such as 0,2,4")
    parser.add_argument("--only", default="", help="a setting's name")
    parser.add_argument("--rows", default="", help="a part of a row's name")
    parser.add_argument("--out", type=Path, default=Path("runs/where_it_helps"))
    parser.add_argument("--data", type=Path, default=None, help="where the data sets are")
    arguments = parser.parse_args()
    KEPT.mkdir(exist_ok=True)
    seeds = parse_seeds(arguments.seeds) if arguments.seeds else None
    for name, row, seed in missing(arguments.only, arguments.rows, seeds):
        line = _trained(name, row, seed, arguments.out, arguments.data)
        with open(KEPT / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M:%S"), name, row, seed, f"{100 * line['top1']:.2f}", flush=True)


def _trained(name: str, row: str, seed: int, out: Path, data: Path | None) -> dict[str, Any]:
    wanted = SETTINGS[name].recipe(row, seed)
    folder = out / f"{name}-{row.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    options = replace(OPTIONS, out=folder, data_root=data, eval_every=wanted.epochs)
    run = run_or_resume(wanted, options, train)
    test = run.last["test"]
    environment = json.loads((folder / "environment.json").read_text())
    del environment["data_root"]  # this machine's
    return {
        "row": row,
        "seed": seed,
        "top1": summarise(run).last,
        "ensemble_top1": test["ensemble_top1"],
        "test": test,
        "seconds": round(sum(line["seconds"] for line in run.metrics), 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "recipe": wanted.to_json(),
        "environment": environment,
    }


if __name__ == "__main__":
    main()
