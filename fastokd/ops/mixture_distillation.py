"""The one distillation loss: students learn from labels and from a mixture of sources.

For student s and sample b, with sources n the S students and then the E extras:

    mix_sn     = softmax_n(scores_sn)
    target_s   = softmax(sum_n mix_sn z_n / T)                      mix="logits"
               = sum_n mix_sn softmax(z_n / T)                      mix="probs"
    kd_s       = T^2 KL(target_s || softmax(z_s / T))
               = T^2 sum_n mix_sn KL(softmax(z_n / T) || softmax(z_s / T))   mix="pairwise"
    mixture_s  = CE(sum_n mix_sn z_n, labels)
    total      = sum_s mean_b(ce_weight_s CE(z_s, labels) + kd_weight_s kd_s
                              + mixture_ce_weight_s mixture_s)

With ``mixed_with`` (Mixup, CutMix) each CE is (1 - share2) CE(labels) + share2 CE(labels2), and with
``sample_weight_B`` it is multiplied by its sample's weight; kd sees neither.

OKDDip's Equations 5 to 8, DML, CL-ILR, ONE, KD, KDCL and FFSD's logit terms are this with other
scores (docs/methods.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.kernels.layout import Loss
from fastokd.ops.fused_loss import Mix, MixtureLoss, Weight, fused_loss


def mixture_distillation(
    logits_SBC: Tensor,
    labels_B: Tensor,
    scores: Tensor,
    *,
    extra_logits_EBC: Tensor | None = None,
    ce_weight: Weight = 1.0,
    kd_weight: Weight = 1.0,
    mixture_ce_weight: Weight = 0.0,
    temperature: float | Tensor = 3.0,
    mix: Mix = "logits",
    detach_targets: bool = False,
    label_smoothing: float = 0.0,
    mixed_with: tuple[Tensor, Tensor] | None = None,
    sample_weight_B: Tensor | None = None,
    impl: str = "auto",
) -> MixtureLoss:
    """The summed loss of S students over a batch (the equations of this module).

    Args:
        logits_SBC: students' logits.
        labels_B: class ids, or soft labels ``[B, C]``. An id out of range gives NaN for its sample.
        scores: ``[S, N]`` or ``[B, S, N]`` with N = S + E. A source at -inf contributes nothing,
            even where it is NaN; a row of -inf alone has no target, and its terms are 0.
        extra_logits_EBC: further sources (a teacher, a computed target).
        ce_weight, kd_weight, mixture_ce_weight: a number, a 0-d tensor or ``[S]``; no gradient.
        temperature: T > 0, a number or a 0-d tensor; no gradient.
        mix: what is mixed: ``"logits"``, ``"probs"`` or one KL a pair, ``"pairwise"``.
        detach_targets: keeps the KL's target, scores included, out of the gradient.
        label_smoothing: in [0, 1), for both cross-entropies.
        mixed_with: ``(labels2_B, share2_B)``: second class ids and their shares, in [0, 1], of the
            labels. An id out of range gives NaN only where its share isn't 0. Not with soft labels.
        sample_weight_B: multiplies both cross-entropies of a sample; means are over B still.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``MixtureLoss(total, ce_S, kd_S)``; kd holds its T^2, and neither holds its weight.

    Raises:
        UserError: shapes that don't fit, a weight or a share that asks for gradient, T <= 0,
            ``mixed_with`` beside soft labels, an ``impl`` that can't serve the call.
    """
    return fused_loss(
        "mixture_distillation",
        impl,
        reference,
        (logits_SBC, extra_logits_EBC, labels_B, scores, None),
        (ce_weight, kd_weight, mixture_ce_weight, temperature),
        mix,
        detach_targets,
        label_smoothing,
        mixed_with=mixed_with,
        sample_weight_B=sample_weight_B,
    )


def _cross_entropy(logits_SBC: Tensor, loss: Loss) -> Tensor:
    """CE of each student and sample, ``[S, B]``; NaN where a label that counts is out of range."""
    log_p_SBC = F.log_softmax(logits_SBC, dim=-1)
    labels_B, smoothing = loss.labels_B, loss.label_smoothing
    if labels_B.dim() == 2:
        picked_SB = (labels_B.to(log_p_SBC.dtype) * log_p_SBC).sum(-1)
    elif loss.labels2_B is None:
        picked_SB = _of_labels(log_p_SBC, labels_B)
    else:
        assert loss.share2_B is not None
        share2_B = loss.share2_B.to(log_p_SBC.dtype)
        picked_SB = _of_labels(log_p_SBC, labels_B, 1.0 - share2_B)
        picked_SB = picked_SB + _of_labels(log_p_SBC, loss.labels2_B, share2_B)
    ce_SB = -(1.0 - smoothing) * picked_SB - smoothing * log_p_SBC.mean(-1)
    return ce_SB if loss.sample_weight_B is None else ce_SB * loss.sample_weight_B.to(ce_SB.dtype)


def _of_labels(log_p_SBC: Tensor, labels_B: Tensor, share_B: Tensor | float = 1.0) -> Tensor:
    """The share of each label's log probability, ``[S, B]``; NaN where a label out of range has a share."""
    C = log_p_SBC.shape[-1]
    valid_B = (labels_B >= 0) & (labels_B < C)
    if isinstance(share_B, Tensor):
        valid_B = valid_B | (share_B == 0)
    index_SB1 = labels_B.clamp(0, C - 1).long().expand(log_p_SBC.shape[:2])[..., None]
    # Multiplied, not selected, so that the sample's gradient is NaN as its loss is.
    poison_B = torch.where(valid_B, share_B, math.nan).to(log_p_SBC.dtype)
    return log_p_SBC.gather(-1, index_SB1).squeeze(-1) * poison_B


def reference(loss: Loss) -> MixtureLoss:
    """The readable reference; float64 where any input is, else float32."""
    logits_SBC, extra_EBC, _, scores, *_ = loss
    inputs = [logits_SBC, scores] + ([] if extra_EBC is None else [extra_EBC])
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    z_SBC = logits_SBC.to(dtype)
    B = z_SBC.shape[1]
    sources_NBC = z_SBC if extra_EBC is None else torch.cat([z_SBC, extra_EBC.to(dtype)])
    scores_SNB = (scores[None] if scores.dim() == 2 else scores).to(dtype).permute(1, 2, 0)

    listens_SNB1 = (scores_SNB != -math.inf)[..., None]
    has_target_SB1 = listens_SNB1.any(1)
    # Both are masked before use, so that a source at -inf stays out of the gradient too: 0 * NaN is NaN.
    heard_SNBC = torch.where(listens_SNB1, sources_NBC, 0.0)
    scores_SNB = torch.where(has_target_SB1[:, None, :, 0], scores_SNB, 0.0)

    temperature = _given(loss.temperature_0d, loss.temperature)
    ce_SB = _cross_entropy(z_SBC, loss)
    log_q_SBC = F.log_softmax(torch.where(has_target_SB1, z_SBC, 0.0) / temperature, dim=-1)
    kd_SB = _divergence(
        scores_SNB.detach() if loss.detach_targets else scores_SNB,
        heard_SNBC.detach() if loss.detach_targets else heard_SNBC,
        log_q_SBC,
        temperature,
        loss.mix,
    )
    kd_SB = torch.where(has_target_SB1[..., 0], kd_SB * temperature**2, 0.0)

    count = max(B, 1)
    ce_S, kd_S = ce_SB.sum(-1) / count, kd_SB.sum(-1) / count
    ce_weight = _given(loss.ce_weight_S, loss.ce_weight)
    kd_weight = _given(loss.kd_weight_S, loss.kd_weight)
    total = (ce_weight * ce_S + kd_weight * kd_S).sum()
    if loss.has_mixture_ce:
        mixed_SBC = (F.softmax(scores_SNB, dim=1)[..., None] * heard_SNBC).sum(1)
        mixture_SB = _cross_entropy(mixed_SBC, loss)
        mixture_SB = torch.where(has_target_SB1[..., 0], mixture_SB, 0.0)
        mixture_ce_weight = _given(loss.mixture_ce_weight_S, loss.mixture_ce_weight)
        total = total + (mixture_ce_weight * mixture_SB.sum(-1) / count).sum()
    return MixtureLoss(total, ce_S.detach(), kd_S.detach())


def _given(tensor: Tensor | None, number: float) -> Tensor | float:
    return number if tensor is None else tensor


def _divergence(
    scores_SNB: Tensor,
    heard_SNBC: Tensor,
    log_q_SBC: Tensor,
    temperature: float | Tensor,
    mix: str,
) -> Tensor:
    """KL of each student to its target, without T^2, ``[S, B]``."""
    if mix == "logits":
        mixed_SBC = (F.softmax(scores_SNB, dim=1)[..., None] * heard_SNBC).sum(1)
        log_t_SBC = F.log_softmax(mixed_SBC / temperature, dim=-1)
        return (log_t_SBC.exp() * (log_t_SBC - log_q_SBC)).sum(-1)
    log_p_SNBC = F.log_softmax(heard_SNBC / temperature, dim=-1)
    if mix == "probs":
        log_mix_SNB1 = F.log_softmax(scores_SNB, dim=1)[..., None]
        log_t_SBC = torch.logsumexp(log_mix_SNB1 + log_p_SNBC, dim=1)
        return (log_t_SBC.exp() * (log_t_SBC - log_q_SBC)).sum(-1)
    kl_SNB = (log_p_SNBC.exp() * (log_p_SNBC - log_q_SBC[:, None])).sum(-1)
    return (F.softmax(scores_SNB, dim=1) * kl_SNB).sum(1)
