"""A process for each timed loop, so that no loop's memory counts for another.

The parent asks for one step at a time, so it can time several loops in turn::

    with Timed(Spec(recipe, "fastokd")) as ours, Timed(Spec(recipe, "reference")) as theirs:
        times = [(ours.step(), theirs.step()) for _ in range(20)]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from fastokd.benchmark.loops import Loop, OurLoop, PublishedLoop
from fastokd.benchmark.peak import PeakMemory
from fastokd.cohort import ENGINES
from fastokd.device import pick_device, pick_precision, synchronize
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
    """What a worker runs: a recipe, by the loop ``"fastokd"`` or ``"reference"``, and how."""

    recipe: Recipe
    loop: str = "fastokd"
    device: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    compile: bool | None = None
    memory_format: str = "auto"
    capture: bool | None = None
    streams: bool | None = None
    impl: str = "auto"
    threads: int | None = None

    def options(self) -> RunOptions:
        """The options of a run. On a CPU, where compiling takes minutes and hasn't paid, ``"auto"``
        doesn't compile."""
        names = ("device", "precision", "engine", "memory_format", "capture", "streams", "impl")
        compiled = self.compile
        if compiled is None and pick_device(self.device).type == "cpu":
            compiled = False
        return RunOptions(compile=compiled, **{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Checks the options before a worker is started.

        Raises:
            UserError: a device, precision, engine or implementation is unknown or unavailable.
        """
        device = pick_device(self.device)
        precision = pick_precision(self.precision, device)
        if self.loop == "reference" and precision == "fp16":
            raise UserError("the published loop has no fp16: choose fp32 or bf16")
        if self.engine not in ("auto", *ENGINES):
            raise UserError(f"engine is {self.engine!r}: choose auto, {', '.join(ENGINES)}")
        choose("the loss", self.impl, device, {"cpp": None, "triton": None})

    def settled(self) -> Spec:
        """The spec with the engine that ``"auto"`` chooses, measured in its own process so that the
        trials don't count for the step's memory.

        Raises:
            UserError: the loop can't be built.
        """
        if self.loop != "fastokd" or self.engine != "auto":
            return self
        with Timed(self) as timed:
            return replace(self, **timed.first["choice"])


class Timed(Worker):
    """A loop in its own process, ready to step when the constructor returns.

    ``first``: the loop's facts and the machine's.

    Raises:
        UserError: the loop can't be built.
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

    def step(self) -> float:
        """Trains one step; returns its seconds."""
        return float(self.ask("step")["seconds"])

    def peak_memory(self) -> int:
        """The peak of all steps so far, in bytes, without the imports."""
        return int(self.ask("memory")["bytes"])


def loop_here(job: Answer) -> tuple[Answer, Callable[[str], Answer] | None]:
    """Builds the loop of a :class:`Spec`; returns its facts, and the function that answers
    ``"step"`` and ``"memory"``."""
    spec = Spec(**{**job, "recipe": Recipe.from_json(job["recipe"])})
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    try:
        memory = PeakMemory(pick_device(spec.device))
        loop = LOOPS[spec.loop](spec.recipe, spec.options())
        if isinstance(loop, OurLoop) and spec.engine == "auto":
            return {"choice": loop.choose()}, None
        loop.warm_up()
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

    if loop.device.type == "cuda":
        name = torch.cuda.get_device_name(loop.device)
    else:
        name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    facts |= {"device": loop.device.type, "device_name": name, "precision": loop.precision}
    return {**facts, "threads": torch.get_num_threads()}, answer
