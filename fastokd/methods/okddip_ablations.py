"""OKDDip's ablations, the five rows of its Table 5.

Scores between peers: random, the diagonal alone, 0 everywhere, products of features; or OKDDip's own
without a leader.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import Progress, no_one
from fastokd.methods.okddip import OKDDip, TwoLevel
from fastokd.ops.peer_attention_distillation import inner_products


class OKDDipRandom(TwoLevel):
    """*w/o SA (random)*: uniform random weights, rows normalised, drawn for each sample and step."""

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        """``belief_BPP`` in (0, 1], to be normalised."""
        belief_BPP = 1.0 - torch.rand(batch, self.peers, self.peers, generator=generator)
        return {"belief_BPP": belief_BPP}

    def peer_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        return progress.draws["belief_BPP"].log()

    def diagnostics(self, out: CohortOutput) -> dict[str, Tensor]:
        return {}


class _Fixed(TwoLevel):
    """Constant scores between peers."""

    peer_scores_PP: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        self.register_buffer("peer_scores_PP", self.fixed(self.peers), persistent=False)

    @staticmethod
    def fixed(peers: int) -> Tensor:
        """The matrix."""
        raise NotImplementedError

    def peer_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        return self.peer_scores_PP


class OKDDipEntropy(_Fixed):
    """*w/o SA (entropy)*: each peer attends to itself alone; its KL and the gradient are 0."""

    @staticmethod
    def fixed(peers: int) -> Tensor:
        return no_one(peers).fill_diagonal_(0.0)


class OKDDipMean(_Fixed):
    """*w/o SA (mean)*: every peer listens to all peers equally, itself included."""

    @staticmethod
    def fixed(peers: int) -> Tensor:
        return torch.zeros(peers, peers)


class OKDDipSymmetric(TwoLevel):
    """*w/o SA (asymmetry)*: W_L = W_E = I, so that scores are symmetric.

    Raises:
        UserError: the peers' features differ in width.
    """

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        widths = shape.feature_dims[: self.peers]
        if len(set(widths)) > 1:
            raise UserError(
                f"symmetric attention compares the peers' features as they are, but theirs are "
                f"{', '.join(map(str, widths))} wide: use peers of one width, or okddip, which "
                "projects them to a common one"
            )

    def peer_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        features_BPD = torch.stack(out.features[: self.peers], dim=1)
        return inner_products(features_BPD, features_BPD)


class OKDDipNoTwoLevel(OKDDip):
    """*w/o two-level*: every student is a peer, none leads; the recipe keeps one at random."""

    needs = replace(OKDDip.needs, leader=False)
