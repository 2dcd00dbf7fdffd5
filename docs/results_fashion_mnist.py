"""Trains every method on the whole of Fashion-MNIST: the runs of docs/results.md.

    OMP_NUM_THREADS=1 python docs/results_fashion_mnist.py &
    OMP_NUM_THREADS=1 python docs/results_fashion_mnist.py    # one process per core

Trains the missing runs, seed by seed, and stores each finished run's metrics in docs/fashion_mnist/.
It can be killed at any time and restarted. docs/results_page.py writes the page.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.checkpoint import write_durably
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions
from fastokd.run.sweep import run_or_resume
from fastokd.train import train

KEPT = Path(__file__).parent / "fashion_mnist"
MODEL = "resnet8"
SEEDS = (0, 1, 2)
FIRST = ("baseline", "dml", "cl_ilr", "one", "okddip-branch", "okddip-network")
THEN = (
    "ind",
    "okddip_random-branch",
    "okddip_entropy-branch",
    "okddip_mean-branch",
    "okddip_symmetric-branch",
    "okddip_no_two_level-branch",
    "ffsd",
)
OPTIONS = RunOptions(
    device="cpu", precision="bf16", engine="loop", save_every_minutes=3.0, quiet=True
)


class Wanted(NamedTuple):
    """One run."""

    row: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.epochs}epochs-seed{self.seed}"


def wanted() -> list[Wanted]:
    """Every run, in training order: five epochs before twenty, seed by seed."""
    stages = ((FIRST, 5), (THEN, 5), (FIRST, 20), (THEN, 20))
    return [Wanted(row, epochs, seed) for rows, epochs in stages for seed in SEEDS for row in rows]


def main() -> None:
    """Trains the missing runs one after another, skipping those locked by another process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist"))
    arguments = parser.parse_args()
    KEPT.mkdir(exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in wanted():
        if _kept(run).is_file():
            continue
        with _taken(arguments.out / f"{run.name}.lock") as mine:
            if mine and not _kept(run).is_file():
                print(time.strftime("%H:%M:%S"), run.name, "started", flush=True)
                _keep(run, arguments.out / run.name)
                print(time.strftime("%H:%M:%S"), run.name, "stored", flush=True)


def _kept(run: Wanted) -> Path:
    return KEPT / f"{run.name}.jsonl"


def _keep(run: Wanted, folder: Path) -> None:
    """Trains one run to its end and stores it: a line of facts, then one line per epoch."""
    resolved = recipe(f"{run.row}/{MODEL}/fashion_mnist", epochs=run.epochs, seed=run.seed)
    with _metered(folder.with_suffix(".cpu")) as cpu_seconds:
        done = run_or_resume(resolved, replace(OPTIONS, out=folder), train)
        spent = cpu_seconds()
    facts: dict[str, Any] = {
        "recipe": resolved.to_json(),
        "environment": json.loads((folder / "environment.json").read_text()),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "cpu_seconds": round(spent, 1),
    }
    lines = [json.dumps(line) for line in (facts, *done.metrics)]
    write_durably(_kept(run), ("\n".join(lines) + "\n").encode())


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether this process got the run's lock; the lock is released when the process ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _metered(folder: Path) -> Iterator[Any]:
    """CPU seconds of a run over all its processes; a kill loses at most the last five seconds."""
    folder.mkdir(exist_ok=True)
    mine, begun = folder / f"{time.time_ns()}", time.process_time()
    over = threading.Event()

    def note() -> None:
        mine.write_text(str(time.process_time() - begun))

    def watch() -> None:
        while not over.wait(5.0):
            note()

    def total() -> float:
        note()
        return sum(float(file.read_text() or 0) for file in folder.iterdir())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield total
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    main()
