"""The project's speed claims, and how each is measured.

A claim is one recipe run by two programs in turn: ``fastokd`` with its defaults, and the published
loop on the same images. Both programs are first checked for equal results.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.benchmark.equality import StepErrors, step_errors
from fastokd.benchmark.step import InTurn, StepTiming, quartiles, step_macs
from fastokd.benchmark.worker import Spec
from fastokd.errors import UserError
from fastokd.recipe.names import recipe

STUDENT_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Claim:
    """One row of the table: ``recipe`` against the published loop in ``theirs`` precision.

    ``at_least`` and ``share``: the promised ratio and share of the matrix product's speed, on a CPU
    with bf16 instructions.
    """

    name: str
    title: str
    recipe: str
    at_least: float | None = None
    share: float | None = None
    batch_size: int = 128
    ours: str = "auto"
    theirs: str = "fp32"
    steps: int = 10


R32, R18 = "resnet32/cifar100", "resnet18/imagenet"
BY_HAND = "OKDDip branch ResNet-32, loop in bf16 channels-last"
ALL_CLAIMS = (
    Claim("okddip_branch", "OKDDip branch ResNet-32", f"okddip-branch/{R32}", 2.4, 0.70),
    Claim("okddip_network", "OKDDip network ResNet-32", f"okddip-network/{R32}", 2.8, 0.70),
    Claim("ffsd", "FFSD ResNet-32, 2 students + leader", f"ffsd/{R32}", 3.0, 0.65),
    Claim(
        "imagenet",
        "OKDDip network ResNet-18, 224x224, S 2",
        f"okddip-network@2/{R18}",
        2.5,
        0.78,
        batch_size=16,
        steps=6,
    ),
    Claim("by_hand", BY_HAND, f"okddip-branch/{R32}", 1.15, theirs="bf16"),
    Claim(
        "fp32", "OKDDip branch ResNet-32, both in fp32", f"okddip-branch/{R32}", 1.25, ours="fp32"
    ),
)
CLAIMS = {claim.name: claim for claim in ALL_CLAIMS}


@dataclass(frozen=True)
class Outcome:
    """The measurements of a claim."""

    claim: Claim
    equality: StepErrors
    ours: StepTiming
    theirs: StepTiming

    def ratios(self) -> tuple[float, float, float]:
        """Quartiles of the rounds' ratios: lower, median, upper."""
        rounds = zip(self.theirs.seconds, self.ours.seconds, strict=True)
        return quartiles([theirs / ours for theirs, ours in rounds])

    def to_json(self) -> dict[str, Any]:
        """The figures of the table, and both timings."""
        low, ratio, high = self.ratios()
        return {
            "claim": self.claim.name,
            "title": self.claim.title,
            "ratio": ratio,
            "ratio_quartiles": [low, high],
            "at_least": self.claim.at_least,
            "share_at_least": self.claim.share,
            "memory_ratio": self.ours.peak_memory_bytes / self.theirs.peak_memory_bytes,
            "equal": self.equality.holds,
            "errors": vars(self.equality),
            "fastokd": self.ours.to_json(),
            "reference": self.theirs.to_json(),
        }


def measure(claim: Claim, run: Callable[[InTurn], None], **settings: Any) -> Outcome:
    """Checks that both programs agree, then lets ``run`` step them in turn.

    ``settings``: fields of :class:`Spec` for both programs (device, threads).

    Raises:
        UserError: the programs don't agree, or one of them can't be built.
    """
    of = recipe(claim.recipe, batch_size=claim.batch_size)
    ours = Spec(of, precision=claim.ours, **settings).settled()
    theirs = Spec(of, "reference", precision=claim.theirs, **settings)
    found = step_errors(of, ours.options())
    if not found.holds:
        raise UserError(
            f"{claim.recipe} isn't timed, for its step is not the published one: errors {found}"
        )
    with InTurn([ours, theirs]) as loops:
        run(loops)
        return Outcome(claim, found, *loops.timings())


def rounds(count: int) -> Callable[[InTurn], None]:
    """A function that steps each loop ``count`` times."""
    return lambda loops: loops.rounds(count)


def growth_specs(batch_size: int = 128, **settings: Any) -> list[Spec]:
    """A single network, then branch cohorts."""
    names = [f"baseline/{R32}" if S == 1 else f"okddip-branch@{S}/{R32}" for S in STUDENT_COUNTS]
    return [Spec(recipe(name, batch_size=batch_size), **settings) for name in names]


def growth(timings: Sequence[StepTiming]) -> dict[str, Any]:
    """The cost of S students over the first timing's: time and multiply-accumulates."""
    one = timings[0]
    rows = []
    for timing in timings:
        ratios = [a / b for a, b in zip(timing.seconds, one.seconds, strict=True)]
        rows.append(
            {
                "students": timing.spec.recipe.students,
                "time": statistics.median(ratios),
                "macs": step_macs(timing.spec.recipe) / step_macs(one.spec.recipe),
                "fastokd": timing.to_json(),
            }
        )
    title = "Cost of S students over one, branch ResNet-32"
    return {"claim": "students", "title": title, "rows": rows}


HEADER = (
    f"{'measured against the published loop':52} {'ms':>7} {'ratio (quartiles)':>20} {'least':>6} "
    f"{'images/s':>8} {'GFLOP/s':>8} {'of product':>10} {'MB':>6} {'of theirs':>9}"
)


def table(outcomes: Sequence[Outcome]) -> str:
    """The claims as lines of text."""
    lines = [HEADER]
    for outcome in outcomes:
        low, ratio, high = outcome.ratios()
        ours = outcome.ours.to_json()
        memory = outcome.ours.peak_memory_bytes
        spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        least = "" if outcome.claim.at_least is None else f"{outcome.claim.at_least:.2f}"
        lines.append(
            f"{outcome.claim.title:52} {ours['step_ms']:7.1f} {spread:>20} {least:>6} "
            f"{ours['images_per_second']:8.1f} {ours['gflops']:8.1f} "
            f"{ours['peak_fraction']:10.2f} {memory / 1e6:6.0f} "
            f"{memory / outcome.theirs.peak_memory_bytes:9.2f}"
        )
    return "\n".join(lines)


def growth_table(found: dict[str, Any]) -> str:
    """The rows of :func:`growth` as lines of text."""
    lines = [f"{'S':>2} {'time':>6} {'MACs':>6}   (one student: 1)"]
    rows = [f"{row['students']:2} {row['time']:6.2f} {row['macs']:6.2f}" for row in found["rows"]]
    return "\n".join([*lines, *rows])
