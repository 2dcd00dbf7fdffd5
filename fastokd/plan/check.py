"""Whether the model of this CPU foretells its steps: predicted beside measured, each error shown."""

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
    """One program's step: milliseconds as modelled, by term, and as measured."""

    recipe: str
    program: str
    terms_ms: dict[str, float]
    measured_ms: float

    @property
    def modelled_ms(self) -> float:
        """All terms, one after another."""
        return sum(self.terms_ms.values())

    @property
    def error(self) -> float:
        """Of the model, as a share of what was measured."""
        return self.modelled_ms / self.measured_ms - 1

    def __str__(self) -> str:
        found = ", ".join(f"{term} {ms:.1f}" for term, ms in self.terms_ms.items())
        return (
            f"{self.recipe:36} {self.program:10} {self.modelled_ms:8.1f} {self.measured_ms:8.1f} "
            f"{self.error:+7.1%}  {found}"
        )


HEADER = f"{'recipe':36} {'program':10} {'modelled':>8} {'measured':>8} {'error':>7}  terms, ms"


def predict(
    of: Recipe, cpu: Cpu, engine: str = "loop"
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by term of our step, in the CPU's precision, and of the published loop's."""
    ours = trace_ours(of, of.batch_size, engine, cpu.precision, "auto")
    theirs = trace_reference(of, of.batch_size)
    both = [{k: 1e3 * v for k, v in terms(step.ops, cpu).items()} for step in (ours, theirs)]
    return both[0], both[1]


def check(of: Recipe, cpu: Cpu, steps: int = 5, engine: str = "loop") -> list[ModelledStep]:
    """Predicts the steps of both programs, then measures them in turn."""
    predicted = predict(of, cpu, engine)
    specs = [
        Spec(of, device="cpu", precision=cpu.precision, engine=engine),
        Spec(of, "reference", device="cpu"),
    ]
    return [
        ModelledStep(of.name, timing.spec.loop, found, 1e3 * timing.median)
        for found, timing in zip(predicted, time_steps(specs, steps), strict=True)
    ]
