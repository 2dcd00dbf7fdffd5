"""The speed of a training, alone and with an equal one on the same CPUs, by libgomp's spin count.

    python -m bench.bench_two_programs --rounds 5
    python -m bench.bench_two_programs --spin 500 1000 1500 2000 3000

Each setting has two processes that train for ``--seconds``: first one of them, then both at once. The
settings alternate, ``--rounds`` times. The first row is libgomp's default. A ratio is of two rates of
one round. ``fastokd.host.cpus.SPIN_COUNT``, the setting of all our programs, must be at most 5% slower
alone than the first row, and at most 2.5 times slower with an equal program than alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from fastokd.host.cpus import SPIN_COUNT, WAITING, said
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.trial import time_steps

# The default of libgomp if there are no more threads than CPUs.
OWN = 300_000
RECIPE = "okddip-branch/resnet8/digits"  # small regions: a step of 250 images in some tens of ms
WARM_UP = 5
TARGETS = {"of_own": 0.95, "slower": 2.5}


class Program:
    """A process that trains, with one spin count."""

    def __init__(self, spin: int) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in WAITING}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.bench_two_programs", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, "GOMP_SPINCOUNT": str(spin)},
        )
        self.answer()  # waits until it is ready

    def train(self, seconds: float) -> None:
        """Starts a training; :meth:`answer` waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """The images a second of the training."""
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(lines: Iterable[str]) -> None:
    """The program's process: trains for the seconds in each line."""
    one = recipe(RECIPE)
    session = build(one, RunOptions(device="cpu", engine="loop", quiet=True))
    batch = session.next_batch()
    time_steps(session, batch, WARM_UP)
    print(0.0, flush=True)
    for line in lines:
        steps, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < float(line):
            time_steps(session, batch, 1)
            steps += 1
        print(steps * len(batch[1]) / took, flush=True)


def measure(programs: list[Program], seconds: float) -> list[float]:
    """The rates of the programs, running at the same time."""
    for program in programs:
        program.train(seconds)
    return [program.answer() for program in programs]


def spread(figures: list[float]) -> dict[str, float]:
    """Median, lowest and highest of all rounds."""
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def rows(spins: list[int], rounds: int, seconds: float) -> list[dict[str, object]]:
    """The rates and ratios of each setting."""
    pairs = {spin: [Program(spin), Program(spin)] for spin in spins}
    alone: dict[int, list[float]] = {spin: [] for spin in spins}
    beside: dict[int, list[float]] = {spin: [] for spin in spins}
    try:
        for _ in range(rounds):
            for spin, pair in pairs.items():
                alone[spin] += measure(pair[:1], seconds)
                beside[spin].append(statistics.mean(measure(pair, seconds)))
    finally:
        for program in (program for pair in pairs.values() for program in pair):
            program.close()
    own = alone[spins[0]]
    return [
        {
            "spin_count": spin,
            "alone": spread(alone[spin]),
            "beside": spread(beside[spin]),
            "of_own": spread([a / b for a, b in zip(alone[spin], own, strict=True)]),
            "slower": spread([a / b for a, b in zip(alone[spin], beside[spin], strict=True)]),
        }
        for spin in spins
    ]


def main() -> None:
    """Measures, prints a table, and writes it with ``--json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spin", type=int, nargs="+", default=[SPIN_COUNT])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help="what a measured process does")
    args = parser.parse_args()
    if args.serve:
        serve(sys.stdin)
        return
    machine = said()
    found = rows([OWN, *args.spin], args.rounds, args.seconds)
    columns = {"alone": ",.0f", "beside": ",.0f", "of_own": ".2f", "slower": ".2f"}
    titles = ("alone, images/s", "each of two", "of libgomp's own", "times slower")
    print(f"{'spin count':>10} " + "".join(f"{title:>24}" for title in titles))
    for row in found:
        cells = []
        for name, form in columns.items():
            low, middle, high = (row[name][key] for key in ("low", "median", "high"))  # type: ignore[index]
            cells.append(f"{middle:{form}} ({low:{form}} to {high:{form}})")
        print(f"{row['spin_count']:>10} " + "".join(f"{cell:>24}" for cell in cells))
    print(f"measured-cpu, {RECIPE}, {args.rounds} rounds of {args.seconds:g} s; {machine}")
    print(f"least of libgomp's own: {TARGETS['of_own']}; most times slower: {TARGETS['slower']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
