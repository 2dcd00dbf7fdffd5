"""All tables: their runs, how long each still takes, and the processes that train them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastokd.device import environment, pick_device, pick_precision
from fastokd.errors import UserError
from fastokd.host.cpus import share_of_cpus
from fastokd.host.names import counted
from fastokd.recipe.names import Recipe
from fastokd.reproduce.order import Comparison, Job, comparisons, fit, in_order
from fastokd.reproduce.speeds import MOST, SHARE, Estimate, Speeds, flops_per_image, images_of
from fastokd.reproduce.standing import Standing, machine_of, standing_of
from fastokd.reproduce.wanted import Request, Training
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where one run at a time is trained: a GPU, as ``CUDA_VISIBLE_DEVICES`` names it, or CPU threads."""

    gpu: str | None
    threads: int | None


def places(options: RunOptions, processes: int | None) -> list[Place]:
    """One place for each process; by default one for each GPU that ``options.device`` leaves open.

    Raises:
        UserError: the device is unknown; fewer than one process.
    """
    device = pick_device(options.device)
    if processes is not None and processes < 1:
        raise UserError(f"processes is {processes}: it must be at least 1")
    if device.type == "cpu":
        count = processes or 1
        threads = max(1, min(torch.get_num_threads(), share_of_cpus() // count))
        return [Place(None, None if count == 1 else threads)] * count
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = named if named != [""] else [str(i) for i in range(torch.cuda.device_count())]
    gpus = visible if device.index is None else [visible[device.index]]
    return [Place(gpus[i % len(gpus)], None) for i in range(processes or len(gpus))]


@dataclass
class Everything:
    """The runs of several tables in the folder ``out``.

    ``options`` are those of each run. ``first_steps``: each run is stopped after so many steps and
    resumed, to check that it can be.
    """

    requests: Sequence[Request]
    out: Path
    options: RunOptions
    places: Sequence[Place]
    tell: Tell
    first_steps: int | None = None
    measured_on: str = field(init=False)
    comparisons: list[Comparison] = field(init=False)
    trainings: dict[str, Training] = field(init=False)
    no_data: dict[str, str] = field(init=False, default_factory=dict)
    failed: set[str] = field(init=False, default_factory=set)
    since: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.comparisons, self.trainings = comparisons(self.requests, self.options.max_steps)
        device = pick_device(self.options.device)
        self.measured_on = self.options.device
        if device.type == "cuda":  # a process sees one GPU
            self.options = replace(self.options, device="cuda")
        facts = environment(device, pick_precision(self.options.precision, device))
        facts["threads"] = self.places[0].threads or facts["threads"]
        self.speeds = Speeds(self.out, machine_of(facts), self.places[0].threads)

    def find_data(self) -> None:
        """Reads every data set once, downloads it if asked to, and keeps why one can't be used."""
        for training in self.trainings.values():
            of = training.entry.recipe
            if of.dataset not in self.no_data:
                try:
                    load_splits(of, self.options_of(training))
                    self.no_data[of.dataset] = ""
                except UserError as error:
                    self.no_data[of.dataset] = str(error)

    def options_of(self, training: Training) -> RunOptions:
        """The options of one run."""
        taught_by = self.out / training.teacher
        named = (str(taught_by),) if training.teacher and taught_by.exists() else ()
        out, root = self.out / training.folder, self.options.data_root
        own = root and root / training.entry.recipe.dataset
        root = own if own and own.is_dir() else root  # ImageNet beside the CIFARs
        return replace(self.options, out=out, teacher=named, data_root=root, quiet=False)

    def standings(self) -> dict[str, Standing]:
        """Where each run stands; without its data, or its teacher, an unfinished one can't be trained."""
        found = {
            name: standing_of(self.out, training, self.options_of(training))
            for name, training in self.trainings.items()
        }
        for name, training in self.trainings.items():
            at, teacher = found[name], found.get(training.teacher)
            why = self.no_data.get(training.entry.recipe.dataset)
            if at.state in ("begun", "missing", "failed") and why:
                found[name] = replace(at, state="no data", note=why)
            elif at.state in ("begun", "missing") and teacher and teacher.state == "failed":
                found[name] = replace(
                    at, state="failed", note=f"its teacher failed: {teacher.note}"
                )
        return found

    def order(self, at: dict[str, Standing]) -> list[str]:
        """The folders in the order of training."""
        work = {
            name: 0.0
            if at[name].state in ("done", "running")
            else _work(one.entry.recipe, at[name])
            for name, one in self.trainings.items()
        }
        return in_order(self.comparisons, work)

    def measure(self, budget: float) -> None:
        """Measures the speeds that aren't known, at most :data:`SHARE` of ``budget`` hours."""
        at = self.standings()
        self._learn(at)
        left = [n for n in self.order(at) if at[n].state in ("missing", "begun", "failed")]
        recipes = [self.trainings[name].entry.recipe for name in left]
        options = replace(self.options, device=self.measured_on)
        self.speeds.measure(recipes, options, min(MOST, SHARE * 3600 * budget), self.tell)

    def _learn(self, at: dict[str, Standing]) -> None:
        self.speeds.learn((self.trainings[n].entry.recipe, one) for n, one in at.items())

    def estimates(self, at: dict[str, Standing]) -> dict[str, Estimate]:
        """The hours that each run still needs."""
        self._learn(at)
        return {n: self.speeds.estimate(self.trainings[n].entry.recipe, at[n]) for n in at}

    def plan(self, budget: float) -> list[Job]:
        """The runs that can be trained, in order, with those that fit ``budget`` hours."""
        at = self.standings()
        return fit(self.jobs(at), budget, len(self.places), budget)

    def jobs(self, at: dict[str, Standing]) -> list[Job]:
        """The runs that this process may begin, in order."""
        hours = self.estimates(at)
        possible = [n for n in self.order(at) if at[n].state in ("missing", "begun", "failed")]
        return [
            Job(name, hours[name].hours, self.trainings[name].teacher)
            for name in possible
            if name not in self.failed
        ]


def _work(of: Recipe, at: Standing) -> float:
    """FLOPs of the epochs that are left."""
    return flops_per_image(of) * images_of(of, of.epochs - at.epochs)


def summary(at: Mapping[str, Standing]) -> str:
    """``"12 of 333 runs done, 1 failed"``."""
    states = [one.state for one in at.values()]
    count = {state: states.count(state) for state in ("done", "failed", "no data")}
    text = f"{count['done']} of {counted(len(at), 'run')} done"
    text += f", {count['failed']} failed" if count["failed"] else ""
    return text + (f", {count['no data']} lack their data" if count["no data"] else "")
