"""Training steps of several programs, timed in one process and in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.child import Result
from bench.gpu.machine import call_ms
from fastokd.benchmark.loops import Loop, OurLoop, PublishedLoop
from fastokd.benchmark.step import quartiles
from fastokd.learner.learner import WARM_UP_ALONE
from fastokd.recipe.names import Recipe
from fastokd.run.options import RunOptions

# A section with less time left starts no further block.
SPARE_SECONDS = 4.0


@dataclass(frozen=True)
class Program:
    """One row: a recipe's step by ``"fastokd"`` or ``"published"``, and how.

    Attributes:
        cudnn_benchmark: None keeps the program's own setting.
        seconds: the program isn't started with less of the section's time left.
    """

    name: str
    recipe: Recipe
    loop: str = "fastokd"
    engine: str = "loop"
    precision: str = "bf16"
    compile: bool = False
    capture: bool = False
    streams: bool = False
    cudnn_benchmark: bool | None = None
    seconds: float = 4.0

    def build(self, result: Result) -> Loop:
        """The program on drawn images."""
        options = RunOptions(
            device="cpu" if result.dry else "cuda",
            precision=self.precision,
            engine=self.engine,
            compile=self.compile,
            capture=self.capture,
            streams=self.streams,
            impl="torch" if result.dry else "auto",  # a dry run builds no C++
        )
        if self.loop == "published":
            return PublishedLoop.drawn(self.recipe, options)
        return OurLoop(self.recipe, options)


@dataclass(frozen=True)
class Plan:
    """The number of steps: ``warm`` untimed ones, then ``blocks`` of ``steps`` (fewer if a block would
    exceed ``block_seconds``). ``together``: all programs stay in memory, and their blocks alternate."""

    warm: int
    blocks: int
    steps: int
    block_seconds: float
    together: bool = True


FULL = Plan(warm=20, blocks=5, steps=20, block_seconds=3.0)
LARGE = Plan(warm=5, blocks=2, steps=10, block_seconds=1.5, together=False)
DRY = Plan(warm=1, blocks=2, steps=1, block_seconds=1.0)


def measure(result: Result, programs: Sequence[Program], plan: Plan) -> None:
    """A row for each program, in order; a failed program's row has its error."""
    alive: list[_Timed] = []
    plan = DRY if result.dry else plan
    for program in programs:
        row = result.row(name=program.name, recipe=program.recipe.name)
        if result.dry and (program.capture or program.compile):
            row["needs"] = "a GPU"
            continue
        if result.left() < program.seconds:
            row["needs"] = "more time than the section had left"
            continue
        timed = _attempt(result, row, lambda p=program, r=row: _Timed(p, r, result, plan))  # type: ignore[misc]
        if timed is None:
            continue
        if plan.together:
            alive.append(timed)
            continue
        for _ in range(plan.blocks - 1):
            _attempt(result, row, timed.block)
        timed.close()
    for _ in range(plan.blocks - 1):
        for timed in list(alive):
            if result.left() < SPARE_SECONDS:
                return
            if _attempt(result, timed.row, timed.block) is None:
                alive.remove(timed)
                timed.close()


def _attempt(result: Result, row: dict[str, Any], make: Callable[[], Any]) -> Any:
    """The value of ``make()``, or None with the error in the row; writes the row."""
    made = None
    try:
        made = make()
    except Exception as error:
        result.fail(row, error)
    if made is None:
        free()  # the error's frames no longer hold the program
    result.write()
    return made


class _Timed:
    """A built program, after its warm-up and first block."""

    def __init__(self, program: Program, row: dict[str, Any], result: Result, plan: Plan) -> None:
        self.row, self.program, self.plan = row, program, plan
        self.ms: list[float] = []
        self.block_ms: list[float] = []
        free()
        _set_flags((False, False, False, False))
        on_gpu = not result.dry
        before = torch.cuda.memory_allocated() if on_gpu else 0
        reserved = torch.cuda.memory_reserved() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.loop = program.build(result)
        if program.cudnn_benchmark is not None:
            torch.backends.cudnn.benchmark = program.cudnn_benchmark
        self.flags = _flags()
        row["build_seconds"] = time.perf_counter() - started
        first = self.loop.step().clone()
        row["first_loss"] = first.item()
        row["first_step_seconds"] = time.perf_counter() - started - row["build_seconds"]
        # A captured step is replayed after its warm-up.
        warm = max(plan.warm, WARM_UP_ALONE + 3) if program.capture else plan.warm
        for _ in range(warm - 2):
            self.loop.step()
        one = call_ms(self.loop.step, 1, self.loop.device)[0]
        self.steps = max(3, min(plan.steps, int(1e3 * plan.block_seconds / one)))
        if result.dry:
            self.steps = plan.steps
        row["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        self.block()
        if on_gpu:
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            row["reserved_gb"] = (torch.cuda.max_memory_reserved() - reserved) / 1e9

    def block(self) -> bool:
        """Times a block of steps and updates the row."""
        _set_flags(self.flags)
        started = time.perf_counter()
        losses = []
        times = call_ms(lambda: losses.append(self.loop.step()), self.steps, self.loop.device)
        self.block_ms.append(1e3 * (time.perf_counter() - started) / self.steps)
        self.ms += times
        last = float(losses[-1].item())
        low, middle, high = quartiles(self.ms)
        self.row |= {
            "ms": middle,
            "quartiles_ms": [low, high],
            "mean_ms": statistics.mean(self.ms),
            # By the host's clock, with the wait at the end of a block.
            "wall_ms": statistics.mean(self.block_ms),
            "steps": len(self.ms),
            "images_per_second": 1e3 * self.program.recipe.batch_size / middle,
            "last_loss": last,
            "finite": math.isfinite(last) and math.isfinite(self.row["first_loss"]),
        }
        if isinstance(self.loop, OurLoop):
            self.row["steps_not_taken"] = bool(self.loop.session.learner.guard.fault.item())
        return True

    def close(self) -> None:
        """Frees the program's memory."""
        del self.loop
        free()


def _flags() -> tuple[bool, bool, bool, bool]:
    """The process-wide settings of a built program."""
    cudnn = torch.backends.cudnn
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, tf32


def _set_flags(flags: tuple[bool, bool, bool, bool]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags[:3]
    torch.backends.cuda.matmul.allow_tf32 = flags[3]


def free() -> None:
    """Frees unused memory; a session and its step refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
