"""A program of its own for each loop that is timed, so that neither sees the other's memory.

The parent asks for one step at a time, which lets it time several loops in turn::

    with Timed(Spec(recipe, "fastokd")) as ours, Timed(Spec(recipe, "reference")) as theirs:
        times = [(ours.step(), theirs.step()) for _ in range(20)]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastokd.benchmark.loops import Loop, OurLoop, PublishedLoop
from fastokd.benchmark.memory import PeakMemory
from fastokd.benchmark.peak import synchronize
from fastokd.cohort import ENGINES
from fastokd.device import pick_device, pick_precision
from fastokd.errors import UserError
from fastokd.ops.dispatch import choose
from fastokd.recipe.names import Recipe
from fastokd.run.options import RunOptions
from fastokd.run.worker import Answer, Worker, WorkerEndedError

LOOPS: dict[str, Callable[[Recipe, RunOptions], Loop]] = {
    "fastokd": OurLoop,
    "reference": PublishedLoop.drawn,
}


@dataclass(frozen=True)
class Spec:
    """What a worker runs: a recipe by ``"fastokd"`` or ``"reference"``, and how."""

    recipe: Recipe
    loop: str = "fastokd"
    device: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    compile: bool | None = None
    memory_format: str = "auto"
    impl: str = "auto"
    threads: int | None = None

    def options(self) -> RunOptions:
        """As a run would take them; but on a CPU, where compiling takes minutes and hasn't paid,
        it is tried only where it is asked for."""
        compiled = self.compile
        if compiled is None and pick_device(self.device).type == "cpu":
            compiled = False
        return RunOptions(
            device=self.device,
            precision=self.precision,
            engine=self.engine,
            compile=compiled,
            memory_format=self.memory_format,
            impl=self.impl,
        )

    def check(self) -> None:
        """Refuses what no worker could run, before one is started.

        Raises:
            UserError: an unknown device, precision, engine or implementation; or one that isn't here.
        """
        device = pick_device(self.device)
        precision = pick_precision(self.precision, device)
        if self.loop == "reference" and precision == "fp16":
            raise UserError("the published loop has no fp16: choose fp32 or bf16")
        if self.engine not in ("auto", *ENGINES):
            raise UserError(f"engine is {self.engine!r}: choose auto, {', '.join(ENGINES)}")
        choose("the loss", self.impl, device, {"cpp": None, "triton": None})

    def settled(self) -> Spec:
        """With the engine that ``"auto"`` chooses, measured in a process of its own: what the
        trials leave in memory isn't the step's.

        Raises:
            UserError: what the loop's own construction raises.
        """
        if self.loop != "fastokd" or self.engine != "auto":
            return self
        with Timed(self) as timed:
            return replace(self, **timed.first["choice"])


class Timed(Worker):
    """A loop in its own process, ready to step when the constructor returns.

    Raises:
        UserError: the loop's own construction raises it.
    """

    def __init__(self, spec: Spec) -> None:
        job = {**asdict(spec), "recipe": spec.recipe.to_json()}
        try:
            super().__init__("fastokd.benchmark.worker:loop_here", job, threads=spec.threads)
        except WorkerEndedError as ended:
            raise UserError(f"the timed loop: {ended}") from ended
        if "error" in self.first:
            self.close()
            raise UserError(self.first["error"])
        self.facts = self.first

    def step(self) -> float:
        """Trains one step; the seconds that it took."""
        seconds: float = self.ask("step")["seconds"]
        return seconds

    def peak_memory(self) -> int:
        """The most bytes that were held in any step so far, beyond the imports."""
        peak: int = self.ask("memory")["bytes"]
        return peak


def loop_here(job: Answer) -> tuple[Answer, Callable[[str], Answer] | None]:
    """The loop of a :class:`Spec`: its facts, and what answers ``"step"`` and ``"memory"``."""
    spec = Spec(**{**job, "recipe": Recipe.from_json(job["recipe"])})
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    try:
        memory = PeakMemory(pick_device(spec.device))
        loop = LOOPS[spec.loop](spec.recipe, spec.options())
        if isinstance(loop, OurLoop) and spec.engine == "auto":
            return {"choice": loop.choose()}, None
        # The first step makes what is kept between steps; the second is looked at op by op.
        loop.step()
        facts = loop.facts()
        loop.step()
        synchronize(loop.device)
    except UserError as error:
        return {"error": str(error)}, None

    def answer(question: str) -> Answer:
        if question == "memory":
            return {"bytes": memory.read()}
        start = time.perf_counter()
        loop.step()
        synchronize(loop.device)
        return {"seconds": time.perf_counter() - start}

    return {**facts, **_machine(loop)}, answer


def _machine(loop: Loop) -> dict[str, Any]:
    if loop.device.type == "cuda":
        name = torch.cuda.get_device_name(loop.device)
    else:
        name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return {
        "device": loop.device.type,
        "device_name": name,
        "precision": loop.precision,
        "threads": torch.get_num_threads(),
    }
