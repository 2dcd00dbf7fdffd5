"""``fastokd bench step``: how long a training step takes, and what share of the machine it uses.

    FLOPs of a step = 6 x MACs x batch

two a multiply-accumulate, once forward and twice backward, of the students alone: a branch
cohort's trunk counts once, and neither a teacher nor a method's own modules count. They are the
FLOPs that have to be done, not those that were.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.benchmark.peak import MatmulPeak
from fastokd.benchmark.synthetic import num_classes
from fastokd.benchmark.worker import Spec, Timed
from fastokd.device import pick_device
from fastokd.errors import UserError
from fastokd.models import Student, create_model
from fastokd.models.info import count_macs
from fastokd.recipe.names import Recipe

PEAKS = 5


@dataclass(frozen=True)
class StepTiming:
    """One loop's steps: seconds of each, in the order in which they were taken."""

    spec: Spec
    seconds: tuple[float, ...]
    peak_flops: float
    peak_memory_bytes: int
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def flops(self) -> float:
        """FLOP/s of the median step."""
        return step_flops(self.spec.recipe) / self.median

    def quartiles(self) -> tuple[float, float]:
        """Seconds of the first and of the third quartile."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """What ``fastokd bench step --json`` prints."""
        low, high = (1e3 * seconds for seconds in self.quartiles())
        facts = self.facts
        kind = "measured-gpu" if facts["device"] == "cuda" else "measured-cpu"
        return {
            "step_ms": 1e3 * self.median,
            "images_per_second": self.spec.recipe.batch_size / self.median,
            "gflops": self.flops / 1e9,
            "peak_fraction": self.flops / self.peak_flops,
            "peak_memory_bytes": self.peak_memory_bytes,
            "engine": facts["engine"],
            "impls": facts["impls"],
            "device": f"{facts['device_name']}, {facts['threads']} threads"
            if facts["device"] == "cpu"
            else facts["device_name"],
            "how": (
                f"{kind}: median of {len(self.seconds)} steps, quartiles {low:.4g} to {high:.4g} "
                f"ms, {facts['way']}, {facts['precision']}, batch {self.spec.recipe.batch_size}, optimizer "
                f"included; peak {self.peak_flops / 1e9:.4g} GFLOP/s is the best of {PEAKS} "
                f"products in between; torch {torch.__version__}"
            ),
        }


class _Trunk(nn.Module):
    """What a branch cohort shares of a student."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.student.trunk(x_BCHW, self.student.branch_from)[0]


def step_macs(of: Recipe) -> int:
    """Multiply-accumulates of one forward of all students over one image, a trunk counted once."""
    students = {
        name: create_on_meta(name, num_classes(of), **of.model_options) for name in {*of.models}
    }
    with torch.no_grad(), torch.device("meta"):
        x_BCHW = torch.empty(1, 3, of.image_size, of.image_size)
        macs = {name: count_macs(student, x_BCHW) for name, student in students.items()}
        total = sum(macs[name] for name in of.models)
        if of.sharing == "branch":
            trunk = count_macs(_Trunk(students[of.model]), x_BCHW)
            total -= (of.students - 1) * trunk
    return total


def create_on_meta(name: str, classes: int, **options: Any) -> Student:
    """A student in eval mode that has shapes and no memory."""
    with torch.device("meta"):
        return create_model(name, classes, **options).eval()


def step_flops(of: Recipe) -> float:
    """6 x MACs x batch."""
    return 6.0 * step_macs(of) * of.batch_size


class InTurn:
    """Several loops, each in a process of its own, stepped in turn.

    A round is one step of each and, in :data:`PEAKS` of them, a product for the peak::

        with InTurn(specs) as loops:
            for _ in range(20):
                loops.round()
            timings = loops.timings()

    Raises:
        UserError: what a loop's own construction raises; fewer than one thread.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        threads = specs[0].threads
        if threads is not None:
            if threads < 1:
                raise UserError(f"threads is {threads}: it must be at least 1")
            torch.set_num_threads(threads)
        self.specs = tuple(spec.settled() for spec in specs)
        self.seconds: list[list[float]] = [[] for _ in specs]
        self.workers: list[Timed] = []
        try:
            for spec in self.specs:
                worker = Timed(spec)
                self.workers.append(worker)  # at once: it is ended though the next one fails
        except BaseException:
            self.close()
            raise
        device = pick_device(specs[0].device)
        self.precisions = [worker.facts["precision"] for worker in self.workers]
        self.peaks = {name: MatmulPeak(device, name) for name in {*self.precisions}}
        self.peaks_taken = 0

    def first(self) -> None:
        """One step of the first loop."""
        self.seconds[0].append(self.workers[0].step())

    def others(self) -> None:
        """One step of each other loop, and a product while the peak isn't known."""
        for taken, worker in zip(self.seconds[1:], self.workers[1:], strict=True):
            taken.append(worker.step())
        if self.peaks_taken < PEAKS:
            self._peak()

    def round(self) -> None:
        """One step of each."""
        self.first()
        self.others()

    def _peak(self) -> None:
        self.peaks_taken += 1
        for peak in self.peaks.values():
            peak.measure()

    def timings(self) -> list[StepTiming]:
        """What was measured, a loop each."""
        while self.peaks_taken < PEAKS:
            self._peak()
        columns = zip(self.specs, self.seconds, self.precisions, self.workers, strict=True)
        return [
            StepTiming(
                spec,
                tuple(seconds),
                self.peaks[precision].best,
                worker.peak_memory(),
                worker.facts,
            )
            for spec, seconds, precision, worker in columns
        ]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def time_steps(specs: Sequence[Spec], steps: int) -> list[StepTiming]:
    """Times several loops in turn, ``steps`` steps of each."""
    if steps < 1:
        raise UserError(f"steps is {steps}: it must be at least 1")
    for spec in specs:
        spec.check()
    with InTurn(specs) as loops:
        for _ in range(steps):
            loops.round()
        return loops.timings()
