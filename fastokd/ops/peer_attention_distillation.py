"""OKDDip's loss from the peers' queries and keys: the scores are computed in the kernel.

Peer a weighs peer b by the score ``query_a . key_b`` (Equation 10; no 1/sqrt(d)); the leader,
the last student where there is one more than peers, weighs every peer alike and is no source.
The rest is ``mixture_distillation``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.kernels.layout import Loss
from fastokd.ops.fused_loss import Mix, MixtureLoss, Weight, fused_loss
from fastokd.ops.mixture_distillation import reference


def peer_attention_distillation(
    logits_SBC: Tensor,
    labels_B: Tensor,
    query_BPd: Tensor,
    key_BPd: Tensor,
    *,
    ce_weight: Weight = 1.0,
    kd_weight: Weight = 1.0,
    temperature: float | Tensor = 3.0,
    mix: Mix = "logits",
    detach_targets: bool = False,
    label_smoothing: float = 0.0,
    mixed_with: tuple[Tensor, Tensor] | None = None,
    sample_weight_B: Tensor | None = None,
    impl: str = "auto",
) -> MixtureLoss:
    """``mixture_distillation`` with ``peer_scores(query_BPd, key_BPd, S)``.

    Args:
        logits_SBC: students' logits, the leader's last.
        labels_B: class ids, or soft labels ``[B, C]``.
        query_BPd, key_BPd: the peers' projections; P is S, or S - 1 with a leader.
        ce_weight, kd_weight: a number, a 0-d tensor or ``[S]``; no gradient.
        temperature, mix, detach_targets, label_smoothing, mixed_with, sample_weight_B, impl: as
            ``mixture_distillation``'s.

    Returns:
        ``MixtureLoss(total, ce_S, kd_S)``, ``total`` differentiable in logits, queries and keys.

    Raises:
        UserError: as ``mixture_distillation``, and where queries and keys don't fit.
    """
    return fused_loss(
        "peer_attention_distillation",
        impl,
        _reference,
        (logits_SBC, None, labels_B, query_BPd, key_BPd),
        (ce_weight, kd_weight, 0.0, temperature),
        mix,
        detach_targets,
        label_smoothing,
        mixed_with=mixed_with,
        sample_weight_B=sample_weight_B,
    )


def _reference(loss: Loss) -> MixtureLoss:
    assert loss.key_BPd is not None
    scores = peer_scores(loss.scores, loss.key_BPd, loss.logits_SBC.shape[0])
    return reference(loss._replace(scores=scores, key_BPd=None))


def peer_scores(query_BPd: Tensor, key_BPd: Tensor, students: int) -> Tensor:
    """The scores ``[B, S, S]`` of P peers and, where S is P + 1, the leader; fp32 at least."""
    scores_BPP = inner_products(query_BPd, key_BPd)
    if students == scores_BPP.shape[1]:
        return scores_BPP
    return F.pad(F.pad(scores_BPP, (0, 0, 0, 1)), (0, 1), value=-math.inf)


def inner_products(query_BPd: Tensor, key_BPd: Tensor) -> Tensor:
    """``[B, P, P]``: every query with every key, in fp32 at least, under autocast too."""
    if query_BPd.dtype != torch.float64:
        query_BPd, key_BPd = query_BPd.float(), key_BPd.float()
    with torch.autocast(query_BPd.device.type, enabled=False):
        return query_BPd @ key_BPd.mT
