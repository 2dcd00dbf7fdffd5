"""OKDDip's loss from the peers' queries and keys: the scores are computed where they are used.

Peer a listens to peer b with score ``query_a . key_b`` (Equation 5; no 1/sqrt(d)); the leader, the
last student where there is one more than peers, listens to every peer alike, and nobody to it.
The rest is ``mixture_distillation``.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops._dispatch import choose
from fastokd.ops._mixture_op import EAGER_LOSSES, call_fused, in_one_call, refusal
from fastokd.ops.mixture_distillation import (
    Mix,
    MixtureLoss,
    Weight,
    as_argument,
    check_logits,
    check_options,
    mixture_distillation,
    weight,
)


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
    impl: str = "auto",
) -> MixtureLoss:
    """``mixture_distillation`` with ``peer_scores(query_BPd, key_BPd, S)``.

    Args:
        logits_SBC: students' logits, the leader's last.
        labels_B: class ids, or soft labels ``[B, C]``.
        query_BPd, key_BPd: the peers' projections; P is S, or S - 1 with a leader.
        ce_weight, kd_weight: a number, a 0-d tensor or ``[S]``; no gradient.
        temperature, mix, detach_targets, label_smoothing, impl: as ``mixture_distillation``'s.

    Returns:
        ``MixtureLoss(total, ce_S, kd_S)``, ``total`` differentiable in logits, queries and keys.

    Raises:
        UserError: as ``mixture_distillation``, and where queries and keys don't fit.
    """
    if in_one_call(impl, logits_SBC):
        ce_S, ce_number = as_argument(ce_weight)
        kd_S, kd_number = as_argument(kd_weight)
        temperature_0d, temperature_number = as_argument(temperature)
        with suppress(RuntimeError):
            return MixtureLoss._make(
                EAGER_LOSSES["peer_attention_distillation"](
                    logits_SBC, labels_B, query_BPd, key_BPd,
                    ce_S, kd_S, temperature_0d, ce_number, kd_number, temperature_number,
                    mix, detach_targets, label_smoothing,
                )
            )  # fmt: skip
    check_logits(logits_SBC, labels_B)
    check_options(temperature, mix, label_smoothing)
    S, B, _ = logits_SBC.shape
    for name, x in (("query_BPd", query_BPd), ("key_BPd", key_BPd)):
        if x.dim() != 3 or x.shape[0] != B or x.shape[1] not in (S, S - 1) or x.shape[1] < 1:
            raise UserError(
                f"{name} has shape {list(x.shape)}: it must be [{B}, {S} or {S - 1}, width]"
            )
        if not x.is_floating_point():
            raise UserError(f"{name} is {x.dtype}: it must be floating point")
    if query_BPd.shape != key_BPd.shape:
        raise UserError(
            f"query_BPd has shape {list(query_BPd.shape)} and key_BPd {list(key_BPd.shape)}: "
            "they must be the same"
        )
    ce = weight(ce_weight, "ce_weight", logits_SBC)
    kd = weight(kd_weight, "kd_weight", logits_SBC)
    reason = refusal(labels_B, logits_SBC, None, query_BPd, key_BPd)
    impl = choose(
        "peer_attention_distillation", impl, logits_SBC.device, {"cpp": reason, "triton": reason}
    )
    if impl == "torch":
        return mixture_distillation(
            logits_SBC,
            labels_B,
            peer_scores(query_BPd, key_BPd, S),
            ce_weight=ce,
            kd_weight=kd,
            temperature=temperature,
            mix=mix,
            detach_targets=detach_targets,
            label_smoothing=label_smoothing,
            impl="torch",
        )
    to_targets = not detach_targets
    return MixtureLoss(
        *call_fused(
            "peer_attention_distillation",
            impl,
            (logits_SBC, labels_B, query_BPd, key_BPd),
            (ce, kd, temperature),
            (mix, detach_targets, label_smoothing),
            ((0, True), (2, to_targets), (3, to_targets)),
        )
    )


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
