"""Training is killed at random moments, resumed, and ends as if nothing had been.

    python -m tests.faults.kill --kills 300
    python -m tests.faults.kill --kills 20 --only swa --only mixed

A run trains for real in a process of its own and gets SIGKILL after a seeded random time, again and
again until it comes to its end; then the next run starts, of the next recipe in ``features.py``, until
so many kills are done. Every run's end is compared with an undisturbed one's, bit for bit: parameters,
running statistics, optimizers, random states, metrics, the student. State is saved after every step, and
half of the kills wait for a write to begin; those that fall into one are counted.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest.mock import patch

from fastokd.checkpoint import newest_checkpoint
from fastokd.ops import cpp
from fastokd.run.folder import Run
from fastokd.student.file import read_weights
from fastokd.train import train
from tests.faults.features import FEATURES, PLAIN, prepared


@dataclass
class Outcome:
    """What so many kills have done."""

    kills: int = 0
    inside_a_write: int = 0
    runs: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.inside_a_write} of them inside a write, over {self.runs} "
            f"runs: {self.lost} ended otherwise than the undisturbed one"
        )


def digest(folder: Path) -> str:
    """A hash of all that a run ends with, but for the clock's readings."""
    _, tensors, facts, faults = newest_checkpoint(folder / "checkpoints")
    assert not faults, faults
    # Not the file's bytes: safetensors writes the entries of its header in any order.
    student = read_weights(folder / "student.safetensors")
    total = hashlib.sha256()
    for named in (tensors, student.state):
        for name in sorted(named):
            total.update(name.encode())
            total.update(named[name].contiguous().view(-1).numpy().tobytes())
    rows = [
        {k: v for k, v in row.items() if k != "images_per_second" and not k.endswith("seconds")}
        for row in Run.load(folder).metrics
    ]
    best = [path.name for path in sorted((folder / "checkpoints").glob("best-*"))]
    total.update(json.dumps([facts, student.facts, rows, best], sort_keys=True).encode())
    return total.hexdigest()


def in_a_child(work: Callable[[], object]) -> int:
    """Forks a process that does ``work``; its id. Nothing parallel has run in this one yet."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def is_writing(folder: Path) -> bool:
    """Whether something is half written: what is whole has no such name."""
    return any(any(where.glob(".*.tmp*")) for where in (folder, folder / "checkpoints"))


def begin_or_resume(feature: str, folder: Path) -> None:
    """What a job that is started again does. Of the features' runs only the plain one has a report,
    which takes longer than the run."""
    recipe, options = prepared(feature, folder.parent)
    begun = (folder / "checkpoints").is_dir()
    with ExitStack() as stack:
        if feature != PLAIN:
            stack.enter_context(patch("fastokd.report.page.report"))
        train(recipe, options, out=folder, resume=begun)


def wait_for_the_moment(
    child: int, folder: Path, length: float, draw: random.Random
) -> tuple[int, int]:
    """Until the child shall be killed; what ``waitpid`` says of it.

    Half of the moments are any, within the length of a run; the others are within its first, second,
    ... or twelfth write from now on.
    """
    deadline = time.monotonic() + draw.uniform(0, 1.1 * length)
    in_a_write, writes, further = draw.random() < 0.5, draw.randrange(12), draw.uniform(0, 0.003)
    done, status, begun, was_writing = 0, 0, 0, True
    while not done:
        if in_a_write:
            writing = is_writing(folder)
            begun += writing and not was_writing
            was_writing = writing
            if begun > writes:
                time.sleep(further)
                return os.waitpid(child, os.WNOHANG)
        elif time.monotonic() >= deadline:
            break
        time.sleep(0.0001)
        done, status = os.waitpid(child, os.WNOHANG)
    return done, status


def undisturbed(feature: str, folder: Path) -> tuple[float, str]:
    """The seconds that the run takes in a process of its own, and the digest of its end."""
    # The first one makes the data and the teachers.
    _, status = os.waitpid(in_a_child(lambda: prepared(feature, folder.parent)), 0)
    started = time.monotonic()
    _, failed = os.waitpid(in_a_child(lambda: begin_or_resume(feature, folder)), 0)
    assert status == failed == 0, f"the undisturbed run of {feature} failed"
    return time.monotonic() - started, digest(folder)


def kill_one(
    feature: str, folder: Path, length: float, draw: random.Random, outcome: Outcome
) -> int:
    """Begins or resumes a run until it comes to its end; its last process' status."""
    while True:
        child = in_a_child(lambda: begin_or_resume(feature, folder))
        done, status = wait_for_the_moment(child, folder, length, draw)
        if done:
            return status
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome.kills += 1
        outcome.inside_a_write += is_writing(folder)


def kill_and_resume(
    kills: int,
    seed: int,
    place: Path,
    features: Sequence[str],
    say: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Kills until so many kills are done, each run to its end; what came of each feature."""
    cpp.ensure_built()
    # What every child would import: seconds each time.
    for name in ("sklearn.datasets", "matplotlib.backends.backend_agg", "torchvision"):
        importlib.import_module(name)
    importlib.import_module("fastokd.report.page")
    draw = random.Random(seed)
    outcomes = {feature: Outcome() for feature in features}
    whole: dict[str, tuple[float, str]] = {}
    for number, feature in enumerate(itertools.cycle(features)):
        if sum(outcome.kills for outcome in outcomes.values()) >= kills:
            break
        if feature not in whole:
            whole[feature] = undisturbed(feature, place / f"{feature}-whole")
        length, wanted = whole[feature]
        outcome, folder = outcomes[feature], place / f"{feature}-run{number}"
        status = kill_one(feature, folder, length, draw, outcome)
        if status != 0:
            outcome.lost += 1
            say(f"run {number} of {feature} could not be resumed: status {status}")
        elif digest(folder) != wanted:
            outcome.lost += 1
            say(f"run {number} of {feature} ended otherwise")
        else:
            shutil.rmtree(folder)
        outcome.runs += 1
        say(f"{feature}: {outcome}")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[*FEATURES], help="several are allowed")
    parser.add_argument("--keep", type=Path, help="the folder of the runs, which then stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        outcomes = kill_and_resume(
            arguments.kills,
            arguments.seed,
            arguments.keep or Path(place),
            arguments.only or [*FEATURES],
            lambda line: print(line, flush=True),
        )
    for feature, outcome in outcomes.items():
        print(f"{feature}: {outcome}")
    total = Outcome(*(sum(values) for values in zip(*map(astuple, outcomes.values()), strict=True)))
    print(f"together: {total}")
    sys.exit(total.lost > 0)


if __name__ == "__main__":
    main()
