"""``fastokd bench step``: how long a training step takes, and what share of the machine it uses.

    FLOPs of a step = 6 x MACs x batch

Two FLOPs a multiply-accumulate, once forward and twice backward, of the students alone: a branch
cohort's trunk counts once, or once a view; a teacher and a method's own modules don't count. These are required
FLOPs, not executed FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.benchmark.peak import InstructionPeak, MatmulPeak
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
    """One loop's steps: seconds of each, in the order in which they were taken.

    ``product_flops``: FLOP/s of the fastest matrix product; ``instruction_flops``: of the instructions,
    where known.
    """

    spec: Spec
    seconds: tuple[float, ...]
    product_flops: float
    instruction_flops: float | None
    peak_memory_bytes: int
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The facts that ``fastokd bench step --json`` prints."""
        low, _, high = (1e3 * seconds for seconds in quartiles(self.seconds))
        flops = step_flops(self.spec.recipe) / self.median
        facts = self.facts
        kind = "measured-gpu" if facts["device"] == "cuda" else "measured-cpu"
        of_instructions = self.instruction_flops
        peak = f", the instructions' peak {of_instructions / 1e9:.4g}" if of_instructions else ""
        return {
            "step_ms": 1e3 * self.median,
            "images_per_second": self.spec.recipe.batch_size / self.median,
            "gflops": flops / 1e9,
            "product_gflops": self.product_flops / 1e9,
            "peak_fraction": flops / self.product_flops,
            "instruction_gflops": of_instructions and of_instructions / 1e9,
            "peak_memory_bytes": self.peak_memory_bytes,
            "engine": facts["engine"],
            "impls": facts["impls"],
            "device": f"{facts['device_name']}, {facts['threads']} threads"
            if facts["device"] == "cpu"
            else facts["device_name"],
            "how": (
                f"{kind}: median of {len(self.seconds)} steps, quartiles {low:.4g} to {high:.4g} "
                f"ms, {facts['way']}, {facts['precision']}, batch {self.spec.recipe.batch_size}, optimizer "
                f"included; {flops / self.product_flops:.2f} of the {facts['precision']} product's "
                f"{self.product_flops / 1e9:.4g} GFLOP/s (the best of {PEAKS} in between{peak}); torch "
                f"{torch.__version__}"
            ),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class _Trunk(nn.Module):
    """The part of a student that a branch cohort shares."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.student.trunk(x_BCHW, self.student.branch_from)[0]


def step_macs(of: Recipe) -> int:
    """Multiply-accumulates of one forward of all students over one image; a trunk counts once, or once for
    each student that has a view of its own."""
    with torch.no_grad(), torch.device("meta"):
        students = {
            name: create_model(name, num_classes(of), **of.model_options).eval()
            for name in {*of.models}
        }
        x_BCHW = torch.empty(1, 3, of.image_size, of.image_size)
        macs = {name: count_macs(student, x_BCHW) for name, student in students.items()}
        total = sum(macs[name] for name in of.models)
        if of.sharing == "branch" and of.views == "shared":
            total -= (of.students - 1) * count_macs(_Trunk(students[of.model]), x_BCHW)
    return total


def step_flops(of: Recipe) -> float:
    """6 x MACs x batch."""
    return 6.0 * step_macs(of) * of.batch_size


class InTurn:
    """Several loops, each in its own process, stepped in turn.

    A round is one step of each. In :data:`PEAKS` rounds a matrix product is timed as well::

        with InTurn(specs) as loops:
            loops.rounds(20)
            timings = loops.timings()

    Raises:
        UserError: a loop can't be built; fewer than one thread.
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
                self.workers.append(Timed(spec))  # closed even if the next one fails
        except BaseException:
            self.close()
            raise
        device = pick_device(specs[0].device)
        self.precisions = [worker.first["precision"] for worker in self.workers]
        names = {*self.precisions}
        self.products = {name: MatmulPeak(device, name) for name in names}
        self.instructions = {name: InstructionPeak(device, name) for name in names}
        self.peaks_taken = 0

    def first(self) -> None:
        """One step of the first loop."""
        self.seconds[0].append(self.workers[0].step())

    def others(self) -> None:
        """One step of each other loop, and a product until there are enough."""
        for taken, worker in zip(self.seconds[1:], self.workers[1:], strict=True):
            taken.append(worker.step())
        if self.peaks_taken < PEAKS:
            self._peak()

    def rounds(self, count: int) -> None:
        """``count`` steps of each loop."""
        for _ in range(count):
            self.first()
            self.others()

    def _peak(self) -> None:
        self.peaks_taken += 1
        for name, product in self.products.items():
            product.measure()
            self.instructions[name].measure()

    def timings(self) -> list[StepTiming]:
        """The timing of each loop."""
        while self.peaks_taken < PEAKS:
            self._peak()
        rows = zip(self.specs, self.seconds, self.precisions, self.workers, strict=True)
        return [
            StepTiming(
                spec,
                tuple(taken),
                self.products[name].best,
                self.instructions[name].best,
                worker.peak_memory(),
                worker.first,
            )
            for spec, taken, name, worker in rows
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
        loops.rounds(steps)
        return loops.timings()
