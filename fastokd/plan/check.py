"""Checks the model of this CPU: predicted and measured steps, and the error of each prediction."""

from __future__ import annotations

from dataclasses import dataclass

from fastokd.benchmark.step import time_steps
from fastokd.benchmark.worker import Spec
from fastokd.plan.devices import Cpu
from fastokd.plan.roofline import terms
from fastokd.plan.trace import trace_ours, trace_reference
from fastokd.recipe.names import Recipe


@dataclass(frozen=True)
class ModelledStep:
    """One program's step: modelled milliseconds, by term, and measured milliseconds."""

    recipe: str
    program: str
    terms_ms: dict[str, float]
    measured_ms: float

    @property
    def modelled_ms(self) -> float:
        """The sum of all terms."""
        return sum(self.terms_ms.values())

    @property
    def error(self) -> float:
        """The model's error, relative to the measured time."""
        return self.modelled_ms / self.measured_ms - 1

    def __str__(self) -> str:
        found = ", ".join(f"{term} {ms:.1f}" for term, ms in self.terms_ms.items())
        return (
            f"{self.recipe:36} {self.program:10} {self.modelled_ms:8.1f} {self.measured_ms:8.1f} "
            f"{self.error:+7.1%}  {found}"
        )


HEADER = f"{'recipe':36} {'program':10} {'modelled':>8} {'measured':>8} {'error':>7}  terms, ms"


def check(of: Recipe, cpu: Cpu, steps: int = 5, engine: str = "loop") -> list[ModelledStep]:
    """Models the steps of our program and of the published loop, then measures them in turn."""
    traces = (
        trace_ours(of, of.batch_size, engine, cpu.precision, "auto"),
        trace_reference(of, of.batch_size),
    )
    modelled = [{k: 1e3 * v for k, v in terms(step.ops, cpu).items()} for step in traces]
    specs = [
        Spec(of, device="cpu", precision=cpu.precision, engine=engine),
        Spec(of, "reference", device="cpu"),
    ]
    return [
        ModelledStep(of.name, timing.spec.loop, found, 1e3 * timing.median)
        for found, timing in zip(modelled, time_steps(specs, steps), strict=True)
    ]
