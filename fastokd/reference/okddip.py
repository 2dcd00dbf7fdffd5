"""OKDDip's loop as in the paper: students run one by one, one KL at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.models import Student
from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    kl_to_probs,
    summed,
)


class ReferenceTwoLevel(ReferenceCohort):
    """Peers that attend to each other, and a leader (the last) that learns from their mean (Eq. 8).

    A subclass defines :meth:`attention`. ``mix_probs`` is Eq. 5 instead of the published code; ``detach`` stops the gradient into the targets; without ``has_leader`` all
    students are peers.
    """

    mix_probs = False
    detach = False
    has_leader = True

    @property
    def peers(self) -> int:
        """The number of students without the leader."""
        return len(self.students) - int(self.has_leader)

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        """alpha, ``[B, P, P]``: rows sum to 1."""
        raise NotImplementedError

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        logits, peers, temperature = out.logits, self.peers, self.temperature
        attention_BPP = self.attention(out.features[:peers])
        peer_logits_BPC = torch.stack(logits[:peers], dim=1)
        leader_target_BC = peer_logits_BPC.mean(dim=1)
        if self.detach:
            attention_BPP = attention_BPP.detach()
            peer_logits_BPC = peer_logits_BPC.detach()
            leader_target_BC = leader_target_BC.detach()

        ce = self.cross_entropies(out, labels_B)
        if self.mix_probs:
            probs_BPC = F.softmax(peer_logits_BPC / temperature, dim=2)
            mixed_BPC = torch.bmm(attention_BPP, probs_BPC)
            kd = [kl_to_probs(logits[p], mixed_BPC[:, p], temperature) for p in range(peers)]
            leader_target = kl_to_probs(logits[-1], probs_BPC.mean(dim=1), temperature)
        else:
            mixed_BPC = torch.bmm(attention_BPP, peer_logits_BPC)
            kd = [kl_divergence(logits[p], mixed_BPC[:, p], temperature) for p in range(peers)]
            leader_target = kl_divergence(logits[-1], leader_target_BC, temperature)
        if self.has_leader:
            kd.append(leader_target)
        total = summed(ce) + kd_weight * summed(kd)
        return ReferenceLosses(total, ce, kd)


class ReferenceOKDDip(ReferenceTwoLevel):
    """``students`` networks, the last the leader, and the two projections (Eq. 9).

    A mixed cohort has a pair of projections for each width of the peers' features.
    """

    def __init__(
        self,
        model: str | Sequence[str],
        num_classes: int,
        students: int = 4,
        sharing: str = "branch",
    ) -> None:
        super().__init__(model, num_classes, students, sharing)
        widths = []
        for student in list(self.students)[: self.peers]:
            assert isinstance(student, Student)
            widths.append(student.feature_dim)
        self.query, self.key = _projection(widths), _projection(widths)

    def forward(self, x_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and pooled features of every student."""
        out = self.outputs(x_BCHW)
        return out.logits, out.features

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        """Eq. 10."""
        query_BPd, key_BPd = _project(self.query, peer_features), _project(self.key, peer_features)
        return torch.softmax(torch.bmm(query_BPd, key_BPd.transpose(1, 2)), dim=-1)


def _projection(widths: list[int]) -> nn.Module:
    """One linear map, or one for each width."""
    dim = min(widths) // 8
    if len(set(widths)) == 1:
        return nn.Linear(widths[0], dim, bias=False)
    return nn.ModuleDict({str(w): nn.Linear(w, dim, bias=False) for w in set(widths)})


def _project(projection: nn.Module, features: list[Tensor]) -> Tensor:
    """Every feature by its map, ``[B, P, d]``."""
    if isinstance(projection, nn.ModuleDict):
        return torch.stack([projection[str(h.shape[1])](h) for h in features], dim=1)
    mapped_BPd: Tensor = projection(torch.stack(features, dim=1))
    return mapped_BPd
