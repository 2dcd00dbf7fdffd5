"""OKDDip's loop as the paper has it: students one by one, one KL at a time, nothing fused.

It is the oracle of the tests and the yardstick of the benches, so it imports nothing but the
plain students, dispatches no fused op and reads nothing back inside a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.models import Student, create_model


class ReferenceLosses(NamedTuple):
    """The total and what it sums: CE of every student, T^2 KL of every student (Eq. 8)."""

    total: Tensor
    ce: list[Tensor]
    kd: list[Tensor]


class ReferenceOKDDip(nn.Module):
    """``students`` networks, the last the leader, and the two projections (Eq. 9).

    With ``sharing="branch"`` the stages before the student's ``branch_from`` are shared.
    """

    def __init__(
        self, model: str, num_classes: int, students: int = 4, sharing: str = "branch"
    ) -> None:
        super().__init__()
        built = [create_model(model, num_classes) for _ in range(students)]
        self.branch_from = 0
        self.trunk: Student | None = None
        if sharing == "branch":
            self.branch_from = built[0].branch_from
            self.trunk = create_model(model, num_classes)
            self.trunk.keep_stages(0, self.branch_from)
            for student in built:
                student.keep_stages(self.branch_from, None)
        self.students = nn.ModuleList(built)
        width = built[0].feature_dim
        self.query = nn.Linear(width, width // 8, bias=False)
        self.key = nn.Linear(width, width // 8, bias=False)

    def forward(self, x_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and pooled features of every student."""
        if self.trunk is not None:
            x_BCHW, _ = self.trunk.trunk(x_BCHW, self.branch_from)
        logits, features = [], []
        for student in self.students:
            assert isinstance(student, Student)
            output = student.outputs(x_BCHW, self.branch_from)
            logits.append(output.logits_BC)
            features.append(output.features_BD)
        return logits, features


def kl_divergence(student_BC: Tensor, target_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || student), Eq. 3 and 4; the target's gradient is kept."""
    log_q_BC = F.log_softmax(student_BC / temperature, dim=1)
    target_BC = F.softmax(target_BC / temperature, dim=1)
    kl_B = F.kl_div(log_q_BC, target_BC, reduction="none").sum(1)
    return kl_B.mean() * temperature**2


def okddip_losses(
    model: ReferenceOKDDip,
    x_BCHW: Tensor,
    labels_B: Tensor,
    kd_weight: float,
    temperature: float = 3.0,
) -> ReferenceLosses:
    """One forward and Eq. 8."""
    logits, features = model(x_BCHW)
    peers = len(logits) - 1

    peer_features_BPD = torch.stack(features[:peers], dim=1)
    query_BPd = model.query(peer_features_BPD)
    key_BPd = model.key(peer_features_BPD)
    attention_BPP = torch.softmax(torch.bmm(query_BPd, key_BPd.transpose(1, 2)), dim=-1)
    peer_logits_BPC = torch.stack(logits[:peers], dim=1)
    mixed_BPC = torch.bmm(attention_BPP, peer_logits_BPC)

    ce = [F.cross_entropy(logits_BC, labels_B) for logits_BC in logits]
    kd = [kl_divergence(logits[p], mixed_BPC[:, p], temperature) for p in range(peers)]
    kd.append(kl_divergence(logits[peers], peer_logits_BPC.mean(dim=1), temperature))
    total = sum(ce[1:], ce[0]) + kd_weight * sum(kd[1:], kd[0])
    return ReferenceLosses(total, ce, kd)


def okddip_step(
    model: ReferenceOKDDip,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    labels_B: Tensor,
    kd_weight: float,
    temperature: float = 3.0,
) -> ReferenceLosses:
    """One training step."""
    losses = okddip_losses(model, x_BCHW, labels_B, kd_weight, temperature)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return losses
