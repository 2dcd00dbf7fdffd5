"""Training is killed at random moments, resumed, and ends as if nothing had been.

    python -m tests.faults.kill --kills 300

A run trains for real in a process of its own and gets SIGKILL after a seeded random time, again and
again until it comes to its end; then the next run starts, until so many kills are done. Every run's
end is compared with an undisturbed one's, bit for bit: parameters, running statistics, optimizers,
random states, metrics, the student. State is saved after every step, and half of the kills wait for
a write to begin; those that fall into one are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastokd.checkpoint import newest_checkpoint
from fastokd.ops import cpp
from fastokd.recipe.names import recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights
from fastokd.train import train

RECIPE = dataclasses.replace(recipe("okddip-branch@3/resnet8/digits", epochs=2), batch_size=100)
OPTIONS = RunOptions(
    quiet=True, engine="loop", precision="fp32", device="cpu", save_every_steps=1, eval_every=2
)


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
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
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


def begin_or_resume(folder: Path) -> None:
    """What a job that is started again does."""
    begun = (folder / "checkpoints").is_dir()
    train(RECIPE, OPTIONS, out=folder, resume=begun)


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


def kill_and_resume(
    kills: int, seed: int, place: Path, say: Callable[[str], None] = print
) -> Outcome:
    """Kills until so many kills are done, each run to its end."""
    cpp.ensure_built()
    # What every child would import: seconds each time.
    for name in ("sklearn.datasets", "matplotlib.backends.backend_agg", "torchvision"):
        importlib.import_module(name)
    importlib.import_module("fastokd.report.page")
    whole = place / "whole"
    started = time.monotonic()
    _, status = os.waitpid(in_a_child(lambda: begin_or_resume(whole)), 0)
    assert status == 0, "the undisturbed run failed"
    length = time.monotonic() - started
    wanted = digest(whole)
    draw = random.Random(seed)
    outcome = Outcome()
    while outcome.kills < kills:
        folder = place / f"run{outcome.runs}"
        while True:
            child = in_a_child(lambda where=folder: begin_or_resume(where))
            done, status = wait_for_the_moment(child, folder, length, draw)
            if done and status == 0:
                break
            if done:
                outcome.lost += 1
                say(f"run {outcome.runs} could not be resumed: status {status}")
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcome.kills += 1
            outcome.inside_a_write += is_writing(folder)
        if done and status == 0 and digest(folder) != wanted:
            outcome.lost += 1
            say(f"run {outcome.runs} ended otherwise: it is kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        outcome.runs += 1
        say(str(outcome))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        outcome = kill_and_resume(arguments.kills, arguments.seed, Path(place))
    sys.exit(outcome.lost > 0)


if __name__ == "__main__":
    main()
