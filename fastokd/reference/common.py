"""What the loops share: students run one by one, the KL, a plain step.

Nothing is fused, no op of this package is dispatched, and a step has no host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.models import Student, create_model


class ReferenceLosses(NamedTuple):
    """The total and its terms: CE of every student, T^2 KL of every student."""

    total: Tensor
    ce: list[Tensor]
    kd: list[Tensor]


class ReferenceOutputs(NamedTuple):
    """Each student's logits and pooled features, and the shared trunk's output."""

    logits: list[Tensor]
    features: list[Tensor]
    trunk_BCHW: Tensor | None


def kl_to_probs(student_BC: Tensor, target_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || student), the target as probabilities."""
    log_q_BC = F.log_softmax(student_BC / temperature, dim=1)
    kl_B = F.kl_div(log_q_BC, target_BC, reduction="none").sum(1)
    return kl_B.mean() * temperature**2


def kl_divergence(student_BC: Tensor, target_BC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || student), Eq. 3 and 4, the target as logits, not detached."""
    return kl_to_probs(student_BC, F.softmax(target_BC / temperature, dim=1), temperature)


def _kl_divergence(
    student_BC: Tensor, target_BC: Tensor, labels_B: Tensor, temperature: float
) -> Tensor:
    del labels_B
    return kl_divergence(student_BC, target_BC, temperature)


class ReferenceCohort(nn.Module):
    """Several students, and a loss that a subclass defines in :meth:`losses`.

    ``apart``: students who share nothing are trained by optimizers of their own; ``label_loss``: of logits
    and class ids, may be replaced by :func:`fastokd.reference.label_loss.label_loss` with settings;
    ``divergence``: of a student's logits, a target's, class ids and a temperature, may be replaced by one
    of :mod:`fastokd.reference.divergences` where the target is a teacher, or DML's.

    Args:
        model: one name for all, or a name for each student (network sharing).
        num_classes: C.
        students: how many, where ``model`` is one name.
        sharing: with ``"branch"`` the stages before the student's ``branch_from`` are shared.
    """

    temperature = 3.0
    apart = False
    label_loss: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.cross_entropy)
    divergence: Callable[[Tensor, Tensor, Tensor, float], Tensor] = staticmethod(_kl_divergence)

    def __init__(
        self,
        model: str | Sequence[str],
        num_classes: int,
        students: int = 4,
        sharing: str = "branch",
    ) -> None:
        super().__init__()
        names = [model] * students if isinstance(model, str) else list(model)
        built = [create_model(name, num_classes) for name in names]
        self.branch_from = 0
        self.trunk: Student | None = None
        if sharing == "branch":
            self.branch_from = built[0].branch_from
            self.trunk = create_model(names[0], num_classes)
            self.trunk.keep_stages(0, self.branch_from)
            for student in built:
                student.keep_stages(self.branch_from, None)
        self.students = nn.ModuleList(built)

    def outputs(self, x_BCHW: Tensor) -> ReferenceOutputs:
        """Runs the trunk, then each student. ``x_VBCHW`` has images for each student; the trunk's output is
        then the mean over them."""
        if self.trunk is None:
            return self.branch_outputs(x_BCHW, None)
        trunk = self.run_trunk(x_BCHW)
        return self.branch_outputs(trunk, trunk.mean(0) if trunk.dim() == 5 else trunk)

    def run_trunk(self, x_BCHW: Tensor) -> Tensor:
        """The trunk's output; of ``x_VBCHW`` over one view after another."""
        assert self.trunk is not None
        if x_BCHW.dim() == 5:
            return torch.stack([self.run_trunk(view_BCHW) for view_BCHW in x_BCHW])
        return self.trunk.trunk(x_BCHW, self.branch_from)[0]

    def branch_outputs(self, x_BCHW: Tensor, trunk_BCHW: Tensor | None) -> ReferenceOutputs:
        """Runs each student on the trunk's output, or on its own of ``x_VBCHW``."""
        logits, features = [], []
        for index, student in enumerate(self.students):
            assert isinstance(student, Student)
            own_BCHW = x_BCHW[index] if x_BCHW.dim() == 5 else x_BCHW
            output = student.outputs(own_BCHW, self.branch_from)
            logits.append(output.logits_BC)
            features.append(output.features_BD)
        return ReferenceOutputs(logits, features, trunk_BCHW)

    def cross_entropies(self, out: ReferenceOutputs, labels_B: Tensor) -> list[Tensor]:
        """Each student's loss on labels."""
        return [self.label_loss(logits_BC, labels_B) for logits_BC in out.logits]

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        """The loss of one forward; ``kd_weight`` is the ramp's value."""
        raise NotImplementedError

    def optimizers(self, **settings: Any) -> list[torch.optim.Optimizer]:
        """One SGD over all, as published for every method that isn't ``apart``."""
        each = [self] if self.trunk is not None or not self.apart else self.students
        return [torch.optim.SGD(module.parameters(), **settings) for module in each]

    def step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        x_BCHW: Tensor,
        labels_B: Tensor,
        kd_weight: float = 1.0,
    ) -> ReferenceLosses:
        """One training step."""
        losses = self.losses(self.outputs(x_BCHW), labels_B, kd_weight)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        self.after_step()
        return losses

    def after_step(self) -> None:
        """What follows the optimizers' steps."""


def summed(terms: list[Tensor]) -> Tensor:
    """The sum of the terms."""
    return sum(terms[1:], terms[0])


def mean_of_others(logits: list[Tensor], student: int) -> Tensor:
    """The mean of all logits but one student's."""
    others = [other for index, other in enumerate(logits) if index != student]
    return summed(others) / len(others)
