"""The sections in the order in which they run, the most important first."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """One section.

    Attributes:
        seconds: the section isn't started with less time left, and is killed after this time (later if
            the other sections leave more).
        quick: whether ``--quick`` includes it.
        target: ``module:function``, called with a :class:`bench.gpu.child.Result`.
    """

    name: str
    title: str
    seconds: float
    quick: bool
    target: str


SECTIONS = (
    Section("machine", "versions, device copy, 8192^3 bf16", 20, True, "bench.gpu.machine:measure"),
    Section(
        "step", "one bf16 step of every method without a sync", 50, True, "bench.gpu.proven:step"
    ),
    Section(
        "capture", "captured against eager, ragged, FFSD", 40, True, "bench.gpu.proven:capture"
    ),
    Section("steps_resnet32", "ResNet-32, S 4, B 128", 90, True, "bench.gpu.steps:resnet32"),
    Section(
        "steps_imagenet",
        "ResNet-34 and ResNet-18, S 4, B 256",
        75,
        True,
        "bench.gpu.steps:imagenet",
    ),
    Section("ops", "every Triton op against float64", 90, False, "bench.gpu.proven:ops"),
    Section("profile", "kernels and launches of one step", 35, False, "bench.gpu.profiled:measure"),
    Section(
        "compile", "compile + capture, branch ResNet-32", 80, False, "bench.gpu.steps:compiled"
    ),
    Section("op_times", "each op by graph replay", 35, False, "bench.gpu.op_times:measure"),
    Section(
        "train", "fastokd train, two epochs with a resume", 40, False, "bench.gpu.trained:measure"
    ),
    Section("rest", "the other tests of tests/gpu", 40, False, "bench.gpu.proven:rest"),
)
