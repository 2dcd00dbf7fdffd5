"""A program of its own for each loop that is timed, so that neither sees the other's memory.

The parent asks for one step at a time, which lets it time several loops in turn::

    with Worker(Spec(recipe, "fastokd")) as ours, Worker(Spec(recipe, "reference")) as theirs:
        times = [(ours.step(), theirs.step()) for _ in range(20)]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
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
from fastokd.run.session import RunOptions

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
        with Worker(self) as worker:
            return replace(self, **worker.facts["choice"])


class Worker:
    """A loop in its own process, ready to step when the constructor returns.

    Raises:
        UserError: what the loop's own construction raises.
    """

    def __init__(self, spec: Spec) -> None:
        text = json.dumps({**asdict(spec), "recipe": spec.recipe.to_json()})
        environment = dict(os.environ)
        if spec.threads is not None:
            environment["OMP_NUM_THREADS"] = str(spec.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastokd.benchmark.worker", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the timed loop ended early: its own message stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _ask(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._answer()

    def step(self) -> float:
        """Trains one step; the seconds that it took."""
        seconds: float = self._ask("step")["seconds"]
        return seconds

    def peak_memory(self) -> int:
        """The most bytes that were held in any step so far, beyond the imports."""
        peak: int = self._ask("memory")["bytes"]
        return peak

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def serve(text: str, say: Callable[[dict[str, Any]], None]) -> None:
    """The worker's side: answers one question a line until its input ends."""
    values = json.loads(text)
    spec = Spec(**{**values, "recipe": Recipe.from_json(values["recipe"])})
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    try:
        memory = PeakMemory(pick_device(spec.device))
        loop = LOOPS[spec.loop](spec.recipe, spec.options())
        if isinstance(loop, OurLoop) and spec.engine == "auto":
            say({"choice": loop.choose()})
            return
        # The first step makes what is kept between steps; the second is looked at op by op.
        loop.step()
        facts = loop.facts()
        loop.step()
        synchronize(loop.device)
    except UserError as error:
        say({"error": str(error)})
        return
    say({**facts, **_machine(loop)})
    for question in sys.stdin:
        if question.strip() == "memory":
            say({"bytes": memory.read()})
            continue
        start = time.perf_counter()
        loop.step()
        synchronize(loop.device)
        say({"seconds": time.perf_counter() - start})


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


def main() -> None:
    """Answers alone go where the parent reads; whatever else is printed goes to its errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    serve(sys.argv[1], say)


if __name__ == "__main__":
    main()
