"""DKD (Zhao et al., CVPR 2022): KD whose KL is taken apart into the true class's part and the others'.

Scores: the teacher alone, as KD's. ``decoupled_distillation`` takes the KL's place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastokd.cohort import CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import Progress
from fastokd.methods.kd import KD


class DKD(KD):
    """CE + min(epoch / warmup, 1) (alpha TCKD + beta NCKD), the epoch counted from 1.

    Args:
        divergence: ``"dkd"``.
        warmup: epochs over which the term grows linearly; 0 for none.
        options: those of :class:`ScoredMethod`.

    Raises:
        UserError: another ``divergence``.
    """

    needs = replace(KD.needs, mixed_labels=False)

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 4.0,
        divergence: str = "dkd",
        warmup: float = 20.0,
        **options: Any,
    ) -> None:
        own_divergence("dkd", divergence)
        super().__init__(shape, temperature=temperature, divergence=divergence, **options)
        self.warmup = warmup

    def settings(self, progress: Progress) -> dict[str, Any]:
        settings = super().settings(progress)
        epoch = progress.epoch.to(progress.ramp.dtype) + 1.0
        warm = (epoch / self.warmup).clamp(max=1.0) if self.warmup else 1.0
        return {**settings, "kd_weight": settings["kd_weight"] * warm}


def own_divergence(method: str, divergence: str) -> None:
    """Raises where a method that is named after its divergence is given another."""
    if divergence != method:
        raise UserError(
            f"divergence is {divergence!r}, but {method}'s is its own: leave it out, or use kd"
        )
