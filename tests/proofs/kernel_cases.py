"""The launches that are compiled for every target, and what is asked of each.

A case for another kernel: a name, a function that calls its launcher with tensors of the CPU, and
the targets that it is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.proofs.offline import TARGETS


@dataclass(frozen=True)
class Case:
    """A launch. ``rows``: how many rows a program holds, where its rows are aligned; else None."""

    launch: Callable[[], object]
    rows: int | None = None
    targets: tuple[str, ...] = tuple(TARGETS)


def rows(count: int, B: int, C: int, dtype: torch.dtype, pitch: int) -> Tensor:
    return torch.zeros(count, B, pitch, dtype=dtype)[..., :C]


def mixture(
    S: int,
    E: int,
    C: int,
    *,
    B: int = 3,
    dtype: torch.dtype = torch.float32,
    pitch: int = 0,
    mix: str = "logits",
    mixture_ce: float = 0.0,
    detach: bool = False,
    soft: bool = False,
    mixed: bool = False,
    weighted: bool = False,
) -> None:
    """The mixture of S students and E extras with every gradient; ``pitch``: rows are so far apart.

    ``mixed``: a second label for each sample; ``weighted``: a weight for each.
    """
    from fastokd.kernels.mixture_distillation import mixture_distillation

    logits_SBC = rows(S, B, C, dtype, pitch or C)
    extra_EBC = rows(E, B, C, dtype, pitch or C) if E else None
    ids_B, numbers_B = torch.zeros(B, dtype=torch.long), torch.zeros(B)
    labels = torch.zeros(B, C) if soft else ids_B
    mixture_distillation(
        logits_SBC, extra_EBC, labels, torch.zeros(B, S, S + E), None,
        None, torch.ones(()), None, None, 1.0, 1.0, mixture_ce, 3.0, mix, detach, 0.0,
        True, bool(E), True, False,
        ids_B if mixed else None, numbers_B if mixed else None, numbers_B if weighted else None,
    )  # fmt: skip


def peers(S: int, C: int, width: int) -> None:
    """OKDDip's S students, the leader among them, with every gradient."""
    from fastokd.kernels.mixture_distillation import mixture_distillation

    query_BPd = torch.zeros(3, S - 1, width)
    mixture_distillation(
        rows(S, 3, C, torch.float32, C), None, torch.zeros(3, dtype=torch.long),
        query_BPd, query_BPd, None, torch.ones(()), None, None, 1.0, 1.0, 0.0, 3.0,
        "logits", False, 0.0, True, False, True, True,
    )  # fmt: skip


def target(op: str, S: int, C: int, *, targets: int = 1, B: int = 3, **kind: Any) -> None:
    """DKD or DIST of S students, with the gradient; ``kind``: of :func:`rows`, fp32 where it isn't said."""
    from fastokd.kernels.correlation_distillation import correlation_distillation
    from fastokd.kernels.decoupled_distillation import decoupled_distillation

    kind = {"dtype": torch.float32, "pitch": C, **kind}
    logits_SBC, target_SBC = rows(S, B, C, **kind), rows(targets, B, C, **kind)
    if op == "decoupled":
        labels_B = torch.zeros(B, dtype=torch.long)
        decoupled_distillation(logits_SBC, target_SBC, labels_B, 1.0, 8.0, 4.0, True)
    else:
        correlation_distillation(logits_SBC, target_SBC, 1.0, 1.0, 4.0, True)


TWO = ("sm_90", "gfx942")
CASES: dict[str, Case] = {}
for C in (10, 100, 1000):
    for S in (2, 4, 5, 8, 16):
        CASES[f"logits S{S} C{C}"] = Case(partial(mixture, S, 0, C), S)
for S, E in ((3, 1), (9, 7)):
    CASES[f"logits S{S} E{E} C1000"] = Case(partial(mixture, S, E, 1000), S + E)
for mix in ("probs", "pairwise"):
    for S, C in ((4, 100), (4, 1000), (5, 1000), (8, 1000), (16, 1000)):
        CASES[f"{mix} S{S} C{C}"] = Case(partial(mixture, S, 0, C, mix=mix), S)
for S, C, width in ((4, 100, 8), (4, 1000, 64), (8, 1000, 64), (16, 1000, 64)):
    CASES[f"query/key S{S} C{C} d{width}"] = Case(partial(peers, S, C, width), S)
# ONE's ensemble term; FFSD's detached targets; soft labels.
CASES["mixture ce S4 C1000"] = Case(partial(mixture, 4, 0, 1000, mixture_ce=1.0), 4, TWO)
CASES["mixture ce S5 C1000"] = Case(partial(mixture, 5, 0, 1000, mixture_ce=1.0), 5, TWO)
FFSD = partial(mixture, 4, 0, 1000, mix="pairwise", detach=True)
CASES["pairwise detached S4 C1000"] = Case(FFSD, 4, TWO)
CASES["soft labels S4 C1000"] = Case(partial(mixture, 4, 0, 1000, soft=True), 4, TWO)
# Mixup's and CutMix's second labels; weights of samples.
for mix, S, C in (
    ("logits", 4, 100),
    ("logits", 4, 1000),
    ("logits", 8, 1000),
    ("pairwise", 4, 1000),
):
    CASES[f"{mix} mixed labels S{S} C{C}"] = Case(
        partial(mixture, S, 0, C, mix=mix, mixed=True, weighted=C == 1000), S
    )
ONE = partial(mixture, 4, 0, 1000, mixture_ce=1.0, mixed=True)
CASES["mixture ce mixed labels S4 C1000"] = Case(ONE, 4)
CASES["mixed labels S4 C22000"] = Case(
    partial(mixture, 4, 0, 22000, mixed=True, weighted=True), 4, TWO
)
# Half precision: rows padded to a multiple of 16 bytes, and as they come where that is aligned.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
for C, pitch in ((10, 16), (100, 104), (1000, 1000)):
    for name, dtype in HALF.items():
        CASES[f"logits {name} S4 C{C} in rows of {pitch}"] = Case(
            partial(mixture, 4, 0, C, dtype=dtype, pitch=pitch), 4, TWO
        )
# Two sweeps over many classes, and three where probabilities are mixed.
for mix, S in (("logits", 4), ("logits", 16), ("probs", 4), ("pairwise", 4)):
    CASES[f"{mix} S{S} C22000"] = Case(partial(mixture, S, 0, 22000, mix=mix), S, TWO)
# DKD of students that share a target, which is one more row, and of students with one each; DIST.
TARGET_CASES = {
    "decoupled S3 C1000": Case(partial(target, "decoupled", 3, 1000), 4),
    "decoupled S8 C1000": Case(partial(target, "decoupled", 8, 1000), 9, TWO),
    "decoupled S4 C100 bf16 in rows of 104, as many targets": Case(
        partial(target, "decoupled", 4, 100, targets=4, dtype=torch.bfloat16, pitch=104), 2, TWO
    ),
    "decoupled S4 C22000": Case(partial(target, "decoupled", 4, 22000), 2, TWO),
    "correlation S4 C1000": Case(partial(target, "correlation", 4, 1000)),
    "correlation S4 C100 bf16 in rows of 104": Case(
        partial(target, "correlation", 4, 100, dtype=torch.bfloat16, pitch=104), None, TWO
    ),
    "correlation S4 C22000": Case(partial(target, "correlation", 4, 22000), None, TWO),
}
CASES |= TARGET_CASES
