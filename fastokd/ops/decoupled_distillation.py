"""DKD (Zhao et al., CVPR 2022): the KL of the true class against the rest, and the KL among the rest.

With q = softmax(z / T) of the student, p of the target, y the label, and for both b = (p_y, 1 - p_y):

    TCKD = T^2 KL(b_p || b_q)
    NCKD = T^2 KL of the softmaxes over the C - 1 other classes
    loss = mean_b(alpha TCKD + beta NCKD)

T^2 KL(p || q) = TCKD + (1 - p_y) NCKD for each sample. Logs of sums are log-sum-exps over the classes
themselves, so that no probability is too small for its log; published code masks by -1000.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops._library import define
from fastokd.ops._targets import check, fake, stacked, target_loss


def decoupled_distillation(
    logits_BC: Tensor,
    target_logits_BC: Tensor,
    labels_B: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    impl: str = "auto",
) -> Tensor:
    """alpha TCKD + beta NCKD (the equations of this module), a scalar in fp32 (float64 for float64).

    Differentiable once in the student's logits (``impl="torch"``: any number of times).

    Args:
        logits_BC: the student's logits, floating point.
        target_logits_BC: the teacher's; detached.
        labels_B: class ids, integers. An id out of range gives NaN for its sample.
        alpha, beta: weights of TCKD and NCKD, numbers.
        temperature: T > 0, a number. Both terms hold T^2.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Raises:
        UserError: a shape, dtype or number that doesn't fit, fewer than 2 classes, an ``impl`` that
            can't serve the call.
    """
    stacks = stacked(logits_BC, target_logits_BC)
    options = {"alpha": alpha, "beta": beta, "temperature": temperature, "impl": impl}
    return decoupled_losses(*stacks, labels_B, **options)[0]  # type: ignore[arg-type]


def decoupled_losses(
    logits_SBC: Tensor,
    target_SBC: Tensor,
    labels_B: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    impl: str = "auto",
) -> Tensor:
    """:func:`decoupled_distillation` of S students at once, ``[S]``; the target is ``[1, B, C]`` or
    ``[S, B, C]``."""
    check(logits_SBC, target_SBC, 2, alpha=alpha, beta=beta, temperature=temperature)
    B = logits_SBC.shape[1]
    if labels_B.shape != (B,) or labels_B.is_floating_point() or labels_B.dtype == torch.bool:
        raise UserError(
            f"labels_B is {labels_B.dtype} of shape {list(labels_B.shape)}: it must be integers [{B}], "
            "since one class is told from the others"
        )
    if labels_B.device != logits_SBC.device:
        raise UserError(
            f"labels_B is on {labels_B.device} and the logits on {logits_SBC.device}: move one to the "
            "other's device"
        )
    numbers = (float(alpha), float(beta), float(temperature))
    return target_loss(
        "decoupled_distillation", impl, _reference, logits_SBC, target_SBC, labels_B, *numbers
    )


def _reference(
    z_SBC: Tensor, t_SBC: Tensor, labels_B: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    C = z_SBC.shape[2]
    is_label_BC = labels_B[:, None] == torch.arange(C, device=labels_B.device)

    def parts(x_SBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities: of the label, of the rest, and within the rest (0 at the label)."""
        scaled_SBC = x_SBC / temperature
        log_SBC = F.log_softmax(scaled_SBC, dim=-1)
        rest_SB = log_SBC.masked_fill(is_label_BC, -math.inf).logsumexp(-1)
        label_SB = log_SBC.masked_fill(~is_label_BC, 0.0).sum(-1)
        return label_SB, rest_SB, (log_SBC - rest_SB[..., None]).masked_fill(is_label_BC, 0.0)

    label_SB, rest_SB, within_SBC = parts(z_SBC)
    t_label_SB, t_rest_SB, t_within_SBC = parts(t_SBC)
    tckd_SB = t_label_SB.exp() * (t_label_SB - label_SB) + t_rest_SB.exp() * (t_rest_SB - rest_SB)
    nckd_SB = (t_within_SBC.exp() * (t_within_SBC - within_SBC)).sum(-1)
    # Multiplied, not selected, so that the sample's gradient is NaN as its loss is.
    valid_B = (labels_B >= 0) & (labels_B < C)
    poison_B = torch.where(valid_B, temperature**2, math.nan).to(z_SBC.dtype)
    loss_SB = (alpha * tckd_SB + beta * nckd_SB) * poison_B
    return loss_SB.sum(1) / max(len(labels_B), 1)


define(
    "decoupled_distillation(Tensor logits_SBC, Tensor target_SBC, Tensor labels_B, float alpha,"
    " float beta, float temperature, bool ask) -> (Tensor loss_S, Tensor gradient_SBC)",
    fake,
    "decoupled_distillation.decoupled_distillation",
)
