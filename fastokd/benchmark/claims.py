"""What this project claims of its speed, and how each claim is measured.

A claim is one recipe run by two programs in turn: ``fastokd`` as it comes, and the published loop
on the same images. Their equality is checked first; a ratio is printed beside a check that holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastokd.benchmark.equality import StepErrors, step_errors
from fastokd.benchmark.step import InTurn, StepTiming, step_macs
from fastokd.benchmark.worker import Spec
from fastokd.errors import UserError, unknown_name
from fastokd.recipe.names import recipe

STUDENT_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Claim:
    """One line of the table: ``recipe`` against the published loop in ``theirs`` precision.

    ``at_least`` and ``share``: the ratio, and the share of the matrix product's peak, that are
    promised on a CPU with bf16 instructions.
    """

    name: str
    title: str
    recipe: str
    batch_size: int = 128
    ours: str = "auto"
    theirs: str = "fp32"
    at_least: float | None = None
    share: float | None = None
    steps: int = 10


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "okddip_branch",
            "OKDDip branch ResNet-32",
            "okddip-branch/resnet32/cifar100",
            at_least=2.4,
            share=0.70,
        ),
        Claim(
            "okddip_network",
            "OKDDip network ResNet-32",
            "okddip-network/resnet32/cifar100",
            at_least=2.8,
            share=0.70,
        ),
        Claim(
            "ffsd",
            "FFSD ResNet-32, 2 students + leader",
            "ffsd/resnet32/cifar100",
            at_least=3.0,
            share=0.65,
        ),
        Claim(
            "imagenet",
            "OKDDip network ResNet-18, 224x224, S 2",
            "okddip-network@2/resnet18/imagenet",
            batch_size=16,
            at_least=2.5,
            share=0.78,
            steps=6,
        ),
        Claim(
            "by_hand",
            "OKDDip branch ResNet-32, loop in bf16 channels-last",
            "okddip-branch/resnet32/cifar100",
            theirs="bf16",
            at_least=1.15,
        ),
        Claim(
            "fp32",
            "OKDDip branch ResNet-32, both in fp32",
            "okddip-branch/resnet32/cifar100",
            ours="fp32",
            at_least=1.25,
        ),
    )
}


@dataclass(frozen=True)
class Outcome:
    """A claim as it was measured."""

    claim: Claim
    equality: StepErrors
    ours: StepTiming
    theirs: StepTiming

    def ratios(self) -> tuple[float, float, float]:
        """Quartiles of the rounds' ratios: lower, median, upper."""
        rounds = zip(self.theirs.seconds, self.ours.seconds, strict=True)
        ratios = [theirs / ours for theirs, ours in rounds]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high

    def to_json(self) -> dict[str, Any]:
        """Everything that the table is made of."""
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


Progressed = Callable[[InTurn], None]


def find(name: str) -> Claim:
    """A claim by name."""
    if name not in CLAIMS:
        raise unknown_name("claim", name, CLAIMS)
    return CLAIMS[name]


def measure(claim: Claim, run: Progressed, **settings: Any) -> Outcome:
    """Checks that both programs agree, then has ``run`` step them in turn.

    ``settings`` are fields of :class:`Spec` for both: device, threads.

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


def rounds(count: int) -> Progressed:
    """Steps the loops ``count`` times each."""

    def run(loops: InTurn) -> None:
        for _ in range(count):
            loops.round()

    return run


@dataclass(frozen=True)
class Growth:
    """What S students cost, in units of one: time beside multiply-accumulates."""

    timings: tuple[StepTiming, ...]

    def to_json(self) -> dict[str, Any]:
        """A row for each number of students."""
        one = self.timings[0]
        return {
            "claim": "students",
            "title": "Cost of S students over one, branch ResNet-32",
            "rows": [
                {
                    "students": timing.spec.recipe.students,
                    "time": statistics.median(
                        mine / first
                        for mine, first in zip(timing.seconds, one.seconds, strict=True)
                    ),
                    "macs": step_macs(timing.spec.recipe) / step_macs(one.spec.recipe),
                    "fastokd": timing.to_json(),
                }
                for timing in self.timings
            ],
        }


def growth_specs(batch_size: int = 128, **settings: Any) -> list[Spec]:
    """One network alone, then branch cohorts."""
    names = [
        "baseline/resnet32/cifar100" if S == 1 else f"okddip-branch@{S}/resnet32/cifar100"
        for S in STUDENT_COUNTS
    ]
    return [Spec(recipe(name, batch_size=batch_size), **settings) for name in names]


HEADER = (
    f"{'measured against the published loop':52} {'ms':>7} {'ratio (quartiles)':>20} {'least':>6} "
    f"{'images/s':>8} {'GFLOP/s':>8} {'share':>6} {'MB':>6} {'of theirs':>9}"
)


def table(outcomes: Sequence[Outcome]) -> str:
    """The claims side by side."""
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
            f"{ours['peak_fraction']:6.2f} {memory / 1e6:6.0f} "
            f"{memory / outcome.theirs.peak_memory_bytes:9.2f}"
        )
    return "\n".join(lines)


def growth_table(growth: Growth) -> str:
    """Time beside multiply-accumulates, S by S."""
    lines = [f"{'S':>2} {'time':>6} {'MACs':>6}   (one student: 1)"]
    lines += [
        f"{row['students']:2} {row['time']:6.2f} {row['macs']:6.2f}"
        for row in growth.to_json()["rows"]
    ]
    return "\n".join(lines)
