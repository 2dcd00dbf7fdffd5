"""Two programs run in turn in one process: what the benchmarks of this folder report."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastokd.ops import cpp

Row = dict[str, str | float]
Clock = Callable[[], float]


def in_turn(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Clock, calls_in_a_row: int = 1
) -> dict[str, list[float]]:
    """Each call's times in milliseconds, one of each a round, after three rounds of warm-up.

    With ``calls_in_a_row`` above 1 a round calls each so many times in a row and takes the median: the
    time with warm caches, as pytest-benchmark measures. With 1 it is the time with the caches that
    another program leaves, as within a training step.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            once = []
            for _ in range(calls_in_a_row):
                start = clock()
                call()
                once.append(1e3 * (clock() - start))
            if i >= 3:
                times[name].append(statistics.median(once))
    return times


def summary(what: str, times: dict[str, list[float]]) -> Row:
    """Medians of the times, and of the rounds' ratios of ``eager`` to ``cpp`` with their quartiles."""
    ratios = [a / b for a, b in zip(times["eager"], times["cpp"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {"what": what, **medians, "ratio": ratio, "ratio_low": low, "ratio_high": high}


def main(about: str, rows_of: Callable[[int, Clock], list[Row]]) -> None:
    """The command line: builds, measures, prints a table and may write it."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds on a core, not the wall's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reason = cpp.ensure_built()
    if reason is not None:
        raise SystemExit(reason)
    rows = rows_of(args.rounds, time.process_time if args.cpu_time else time.perf_counter)
    print(f"{'measured-cpu':44} eager ms   cpp ms  ratio (quartiles)   bound ms")
    for row in rows:
        bound = f"{row['bound_ms']:9.3f}" if "bound_ms" in row else ""
        print(
            f"{row['what']:44} {row['eager_ms']:8.3f} {row['cpp_ms']:8.3f}  {row['ratio']:5.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) {bound}"
        )
    kind = "CPU" if args.cpu_time else "wall"
    print(
        f"torch {torch.__version__}, {args.threads} threads, {cpp.capability()}, {kind} time, "
        f"{args.rounds} rounds"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
