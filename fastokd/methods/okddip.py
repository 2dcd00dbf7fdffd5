"""OKDDip (Chen et al., AAAI 2020): peers that attend to each other, and a leader that learns from all.

Scores: (W_L h_a) . (W_E h_b) from peer a to peer b (Eq. 9 and 10), 0 from the leader to every peer
(Eq. 7), -inf to the leader. Nothing is detached: the projections get their gradient only through the
KL's targets (Eq. 5 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import MethodLoss, Progress
from fastokd.methods.scored import ScoredMethod
from fastokd.ops.peer_attention_distillation import inner_products, peer_attention_distillation


class TwoLevel(ScoredMethod):
    """Peers that listen to each other by :meth:`peer_scores`, and a leader that listens to all equally.

    Eq. 8: CE of every student + w (T^2 KL of each peer to its own mixture + the leader's to the
    mean of the peers), w the recipe's ramp. ``mix="logits"`` as published in code, ``"probs"`` as
    in Eq. 5.
    """

    needs = replace(ScoredMethod.needs, sharing=("branch", "network"), leader=True)

    def peer_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        """Scores of the peers for each other, ``[P, P]`` or ``[B, P, P]``."""
        raise NotImplementedError

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self._all_scores(out, progress)

    def _all_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        scores = self.peer_scores(out, progress)
        if not self.needs.leader:
            return scores
        with_row = F.pad(scores, (0, 0, 0, 1))
        return F.pad(with_row, (0, 1), value=-math.inf)

    def diagnostics(self, out: CohortOutput) -> dict[str, Tensor]:
        mixing = self._all_scores(out, Progress.start()).float().softmax(-1)
        return {"attention": mixing if mixing.dim() == 2 else mixing.mean(0)}


class OKDDip(TwoLevel):
    """Learned attention: one query and one key projection, shared by all the peers.

    Peers of several architectures get a pair of projections for each width of their features, all
    to ``attention_dim`` dimensions. The leader's features are never read.

    Args:
        attention_dim: d; by default an eighth of the (narrowest) peers' width.
        options: those of :class:`ScoredMethod`. With ``detach_targets`` the projections get no
            gradient.

    Raises:
        UserError: features too narrow for the default, a divergence whose targets are detached.
    """

    def __init__(
        self, shape: CohortShape, *, attention_dim: int | None = None, **options: Any
    ) -> None:
        super().__init__(shape, **options)
        if not self.divergence.fused:
            raise UserError(
                "the attention learns through the KL's targets, which are detached for divergence dkd and "
                "dist and for standardise_logits: leave these out, or use okddip_mean or okddip_kd"
            )
        widths = shape.feature_dims[: self.peers]
        dim = attention_dim or min(widths) // 8
        if not dim:
            raise UserError(
                f"features of width {min(widths)} have no eighth: give attention_dim of at least 1"
            )
        self.query = _projection(widths, dim)
        self.key = _projection(widths, dim)

    def projections(self, out: CohortOutput) -> tuple[Tensor, Tensor]:
        """The peers' queries and keys, ``[B, P, d]`` each."""
        features = out.features[: self.peers]
        return _project(self.query, features), _project(self.key, features)

    def peer_scores(self, out: CohortOutput, progress: Progress) -> Tensor:
        return inner_products(*self.projections(out))

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        """The loss for :meth:`scores`, which the op computes from queries and keys."""
        query_BPd, key_BPd = self.projections(out)
        loss = peer_attention_distillation(
            out.logits_SBC,
            labels_B,
            query_BPd,
            key_BPd,
            **self.settings(progress),
            **self.label_loss.arguments(labels_B, progress.mixed_with),
        )
        total, ce_S = self.label_loss.losses(loss, out.logits_SBC, labels_B, progress.mixed_with)
        return MethodLoss(total, {"ce_S": ce_S, "kd_S": loss.kd_S})


def _projection(widths: Sequence[int], dim: int) -> nn.Linear | nn.ModuleDict:
    """One linear map, or one for each distinct width under its number."""
    distinct = sorted(set(widths))
    if len(distinct) == 1:
        return nn.Linear(distinct[0], dim, bias=False)
    return nn.ModuleDict({str(width): nn.Linear(width, dim, bias=False) for width in distinct})


def _project(projection: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """``[B, P, d]`` of a ``[B, D_p]`` for each peer."""
    if isinstance(projection, nn.ModuleDict):
        mapped = [projection[str(feature_BD.shape[1])](feature_BD) for feature_BD in features]
        return torch.stack(mapped, dim=1)
    mapped_BPd: Tensor = projection(torch.stack(list(features), dim=1))
    return mapped_BPd
