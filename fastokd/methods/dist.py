"""DIST (Huang et al., NeurIPS 2022): probabilities that correlate with a stronger teacher's.

Scores: the teacher alone, as KD's. ``correlation_distillation`` takes the KL's place.
"""

from __future__ import annotations

from typing import Any

from fastokd.cohort import CohortShape
from fastokd.methods.dkd import own_divergence
from fastokd.methods.kd import KD


class DIST(KD):
    """CE + 2 (beta inter + gamma intra), without a ramp.

    Args:
        kd_weight: the 2.
        divergence: ``"dist"``.
        options: those of :class:`ScoredMethod`.

    Raises:
        UserError: another ``divergence``.
    """

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 1.0,
        kd_weight: float = 2.0,
        divergence: str = "dist",
        **options: Any,
    ) -> None:
        own_divergence("dist", divergence)
        super().__init__(
            shape, temperature=temperature, kd_weight=kd_weight, divergence=divergence, **options
        )
