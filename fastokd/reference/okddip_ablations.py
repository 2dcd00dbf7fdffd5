"""OKDDip's ablations, the five rows of its Table 5."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.reference.okddip import ReferenceOKDDip, ReferenceTwoLevel


class ReferenceRandom(ReferenceTwoLevel):
    """Uniform random weights, rows normalised. Set ``belief_BPP`` before each step."""

    belief_BPP: Tensor

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        return self.belief_BPP / self.belief_BPP.sum(dim=2, keepdim=True)


class ReferenceEntropy(ReferenceTwoLevel):
    """Each peer attends to itself."""

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        h = peer_features[0]
        return torch.eye(self.peers, dtype=h.dtype).expand(len(h), -1, -1)


class ReferenceMean(ReferenceTwoLevel):
    """Each peer attends to all alike."""

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        h = peer_features[0]
        return torch.full((len(h), self.peers, self.peers), 1 / self.peers, dtype=h.dtype)


class ReferenceSymmetric(ReferenceTwoLevel):
    """W_L = W_E = I."""

    def attention(self, peer_features: list[Tensor]) -> Tensor:
        rows = [
            torch.softmax(torch.stack([(a * b).sum(1) for b in peer_features], dim=1), dim=1)
            for a in peer_features
        ]
        return torch.stack(rows, dim=1)


class ReferenceNoTwoLevel(ReferenceOKDDip):
    """All students are peers."""

    has_leader = False
