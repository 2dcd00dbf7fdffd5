"""How many hours each run still needs, from real speeds, a measured step, or counted FLOPs."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastokd.benchmark.step import step_macs
from fastokd.benchmark.worker import Spec, Timed
from fastokd.checkpoint import read_object, write_durably
from fastokd.errors import UserError
from fastokd.methods import method_class
from fastokd.plan.plan import TRAIN_IMAGES
from fastokd.recipe.names import Recipe, recipe
from fastokd.reproduce.standing import Standing
from fastokd.run.options import RunOptions
from fastokd.student.teacher import teacher_recipe

FILE = "speeds.json"
# Of the test split, whose images take a forward pass each after every epoch.
TEST_IMAGES = {"imagenet": 50_000, "svhn": 26_032, "stl10": 8_000, "digits": 1_297}
OTHER_TESTS = 10_000
STEPS = 3
# The share of a budget, and the most seconds, that measuring may take.
SHARE, MOST = 0.02, 600.0
# A class whose steps would take longer is modelled from the others.
LONGEST_STEP = 15.0
# MACs of a student and of its trunk, by model and image size.
_ALONE: dict[tuple[str, int], int] = {}
_TRUNK: dict[tuple[str, int], int] = {}
HOW = {
    "own": "this run's own epochs",
    "alike": "epochs of runs of the same class",
    "measured": "a measured step of the class on drawn images",
    "modelled": "counted FLOPs at the measured FLOP/s of another class",
    "unknown": "nothing: no speed is measured yet",
}


def work_class(of: Recipe) -> str:
    """What a step's time depends on: the same for both CIFARs, and for the methods of a table."""
    needs = method_class(of.method).needs
    with_teacher = f", teacher {of.teacher.split('/')[1]}" if of.teacher else ""
    sharing = f", {of.students} students by {of.sharing}" if of.students > 1 else ""
    maps = ", feature maps" if needs.maps else ""
    return f"{of.model}, {of.image_size} px, batch {of.batch_size}{sharing}{with_teacher}{maps}"


def flops_per_image(of: Recipe) -> float:
    """6 x MACs of the students, and 2 x those of a teacher: its forward pass."""
    taught = 2.0 * _macs(teacher_recipe(of)) if of.teacher else 0.0
    return 6.0 * _macs(of) + taught


def _macs(of: Recipe) -> int:
    """Of all students. Counting takes seconds: one student is counted once, and so is a trunk. Those of the
    two CIFARs differ by a share of the last layer, which is left out."""
    if "+" in of.model:
        return step_macs(of)
    S, place = of.students, (of.model, of.image_size)
    if place not in _ALONE:
        _ALONE[place] = step_macs(recipe(f"baseline/{of.model}/{of.dataset}"))
    if S == 1 or of.sharing != "branch" or of.views != "shared":
        return S * _ALONE[place]
    if place not in _TRUNK:
        _TRUNK[place] = (S * _ALONE[place] - step_macs(of)) // (S - 1)
    return S * _ALONE[place] - (S - 1) * _TRUNK[place]


def images_of(of: Recipe, epochs: int) -> float:
    """Images of ``epochs`` epochs; those that are evaluated count a third, their forward pass."""
    name = of.dataset
    return epochs * (
        TRAIN_IMAGES.get(name, 50_000) * of.repeats + TEST_IMAGES.get(name, OTHER_TESTS) / 3
    )


@dataclass(frozen=True)
class Estimate:
    """Hours that a run still needs, and how they were got: a key of :data:`HOW`."""

    hours: float
    how: str


class Speeds:
    """``speeds.json``: images/s of a step of each measured class on this machine.

    Args:
        out: the folder of the runs.
        machine: as :func:`machine_of` has it; runs and measurements of others don't count.
        threads: of a run on the CPU.
    """

    def __init__(self, out: Path, machine: str, threads: int | None = None) -> None:
        self.path = out / FILE
        self.machine = machine
        self.threads = threads
        self._alike: dict[str, float] = {}

    def _rows(self) -> dict[str, tuple[float, float]]:
        """Images/s of each measured class, and the FLOPs of an image."""
        try:
            rows = read_object(self.path, "speeds").get(self.machine, {})
            names = "images_per_second", "flops_per_image"
            found = {key: tuple(float(row[name]) for name in names) for key, row in rows.items()}
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return {}  # damaged: measured again
        return {key: (a, b) for key, (a, b) in found.items() if 0 < a < math.inf and b > 0}

    def learn(self, runs: Iterable[tuple[Recipe, Standing]]) -> None:
        """Takes the real speeds of the runs on this machine."""
        rates: dict[str, list[float]] = {}
        for of, at in runs:
            if at.rate and at.machine == self.machine:
                rates.setdefault(work_class(of), []).append(at.rate)
        self._alike = {name: statistics.median(found) for name, found in rates.items()}

    def estimate(self, of: Recipe, at: Standing) -> Estimate:
        """The hours of the epochs that are left, by the best speed that is known."""
        if at.state == "done":
            return Estimate(0.0, "own")
        rate, how = self._rate(of, at)
        images = images_of(of, of.epochs - at.epochs)
        return Estimate(images / rate / 3600 if rate else math.inf, how)

    def _rate(self, of: Recipe, at: Standing) -> tuple[float, str]:
        """Images/s, and how they were got."""
        name, measured = work_class(of), self._rows()
        if at.rate and at.machine == self.machine:
            return at.rate, "own"
        if name in self._alike:
            return self._alike[name], "alike"
        if name in measured:
            return measured[name][0], "measured"
        if not measured:
            return 0.0, "unknown"
        own = flops_per_image(of)
        rate, flops = min(measured.values(), key=lambda row: abs(math.log(row[1] / own)))
        return rate * flops / own, "modelled"

    def measure(
        self,
        recipes: Iterable[Recipe],
        options: RunOptions,
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        """Times a few steps of each class that isn't known, in this order, for about ``seconds``."""
        end = time.monotonic() + seconds
        firsts: dict[str, Recipe] = {}
        for of in recipes:
            firsts.setdefault(work_class(of), of)
        for name, of in firsts.items():
            if name in self._alike or name in self._rows():
                continue
            rate, how = self._rate(of, Standing("missing"))
            if how == "modelled" and of.batch_size / rate > LONGEST_STEP:
                continue
            if time.monotonic() >= end:
                return
            say(f"measuring a step of {name}")
            try:
                self._note(name, of, _step_seconds(of, options, self.threads))
            except UserError as error:  # such as too little memory: its run will say so, too
                say(f"{name} can't be measured: {error}")

    def _note(self, name: str, of: Recipe, seconds: float) -> None:
        try:
            known = read_object(self.path, "speeds")
        except UserError:
            known = {}
        rows = known.get(self.machine)
        if not isinstance(rows, dict):
            rows = known[self.machine] = {}
        rows[name] = {
            "images_per_second": of.batch_size / seconds,
            "flops_per_image": flops_per_image(of),
            "how": f"measured: median of {STEPS} steps of {of.name} on drawn images, engine loop",
        }
        write_durably(self.path, (json.dumps(known, indent=1) + "\n").encode())


def _step_seconds(of: Recipe, options: RunOptions, threads: int | None) -> float:
    """The median step of the loop engine; a run may find a faster one."""
    names = ("device", "precision", "impl", "capture", "memory_format")
    engine = "loop" if options.engine == "auto" else options.engine
    how = {name: getattr(options, name) for name in names}
    spec = Spec(of, engine=engine, threads=threads, **how)
    timed = Timed(spec)
    with timed:
        return statistics.median(timed.step() for _ in range(STEPS))
