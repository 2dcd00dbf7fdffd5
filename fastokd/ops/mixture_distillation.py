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

OKDDip's Equations 6 to 8, DML, CL-ILR, ONE, KD, KDCL and FFSD's logit terms are this with other
scores (docs/methods.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops._dispatch import choose
from fastokd.ops._mixture_op import EAGER_LOSSES, call_fused, in_one_call, refusal

Mix = Literal["logits", "probs", "pairwise"]
Weight = float | Sequence[float] | Tensor


class MixtureLoss(NamedTuple):
    """``total`` carries gradient; ``ce_S`` and ``kd_S`` are detached batch means, fp32."""

    total: Tensor
    ce_S: Tensor
    kd_S: Tensor


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
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``MixtureLoss(total, ce_S, kd_S)``; kd holds its T^2, and neither holds its weight.

    Raises:
        UserError: shapes that don't fit, a weight that asks for gradient, T <= 0, an ``impl`` that
            can't serve the call.
    """
    if in_one_call(impl, logits_SBC):
        ce_S, ce_number = as_argument(ce_weight)
        kd_S, kd_number = as_argument(kd_weight)
        mixture_S, mixture_number = as_argument(mixture_ce_weight)
        temperature_0d, temperature_number = as_argument(temperature)
        with suppress(RuntimeError):
            return MixtureLoss._make(
                EAGER_LOSSES["mixture_distillation"](
                    logits_SBC, extra_logits_EBC, labels_B, scores,
                    ce_S, kd_S, mixture_S, temperature_0d,
                    ce_number, kd_number, mixture_number, temperature_number,
                    mix, detach_targets, label_smoothing,
                )
            )  # fmt: skip
    check_logits(logits_SBC, labels_B)
    check_options(temperature, mix, label_smoothing)
    _check_sources(logits_SBC, scores, extra_logits_EBC)
    ce, kd, mixture_ce = (
        weight(value, name, logits_SBC)
        for value, name in (
            (ce_weight, "ce_weight"),
            (kd_weight, "kd_weight"),
            (mixture_ce_weight, "mixture_ce_weight"),
        )
    )
    reason = refusal(labels_B, logits_SBC, extra_logits_EBC, scores)
    impl = choose(
        "mixture_distillation", impl, logits_SBC.device, {"cpp": reason, "triton": reason}
    )
    if impl == "torch":
        return _torch_impl(
            logits_SBC,
            labels_B,
            scores,
            extra_logits_EBC,
            ce,
            kd,
            mixture_ce,
            temperature,
            mix,
            detach_targets,
            label_smoothing,
        )
    to_targets = not detach_targets or isinstance(mixture_ce, Tensor) or mixture_ce != 0
    return MixtureLoss(
        *call_fused(
            "mixture_distillation",
            impl,
            (logits_SBC, extra_logits_EBC, labels_B, scores),
            (ce, kd, mixture_ce, temperature),
            (mix, detach_targets, label_smoothing),
            ((0, True), (1, to_targets), (3, to_targets)),
        )
    )


def as_argument(value: Weight) -> tuple[Tensor | None, Weight]:
    """A weight or temperature as an operator takes it: a tensor, and a number that multiplies it."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, value)


def check_logits(logits_SBC: Tensor, labels_B: Tensor) -> None:
    """Raises where logits or labels have a shape or dtype that doesn't fit."""
    given = logits_SBC.shape
    if len(given) != 3 or not logits_SBC.is_floating_point() or not given[0] * given[2]:
        raise UserError(
            f"logits_SBC is {logits_SBC.dtype} of shape {list(given)}: it must be floating point, "
            "[students, batch, classes], of a student and a class at least"
        )
    _, B, C = logits_SBC.shape
    hard = labels_B.dim() == 1
    if labels_B.shape != ((B,) if hard else (B, C)) or hard == labels_B.is_floating_point():
        raise UserError(
            f"labels_B is {labels_B.dtype} of shape {list(labels_B.shape)}: "
            f"it must be integers [{B}] or floating point [{B}, {C}]"
        )


def check_mix(mix: str) -> None:
    """Raises where ``mix`` is none."""
    if mix not in ("logits", "probs", "pairwise"):
        raise UserError(f"mix is {mix!r}: choose logits, probs or pairwise")


def check_options(temperature: float | Tensor, mix: str, label_smoothing: float) -> None:
    """Raises where an option is out of range; reads no tensor's values."""
    check_mix(mix)
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}: it must be in [0, 1)")
    if isinstance(temperature, Tensor):
        if temperature.dim() or temperature.requires_grad:
            raise UserError("temperature must be a number or a 0-d tensor without gradient")
    elif not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature is {temperature}: it must be a finite number above 0")


def _check_sources(logits_SBC: Tensor, scores: Tensor, extra_logits_EBC: Tensor | None) -> None:
    S, B, C = logits_SBC.shape
    E = 0
    if extra_logits_EBC is not None:
        if extra_logits_EBC.dim() != 3 or extra_logits_EBC.shape[1:] != (B, C):
            raise UserError(
                f"extra_logits_EBC has shape {list(extra_logits_EBC.shape)}: "
                f"it must be [extras, {B}, {C}], as the students' logits"
            )
        E = extra_logits_EBC.shape[0]
    if scores.shape not in ((S, S + E), (B, S, S + E)) or not scores.is_floating_point():
        raise UserError(
            f"scores is {scores.dtype} of shape {list(scores.shape)}: it must be floating point, "
            f"[{S}, {S + E}] or [{B}, {S}, {S + E}] (students by sources)"
        )


def weight(value: Weight, name: str, logits_SBC: Tensor) -> Tensor | float:
    """A weight as a number or a tensor of its students; 0 stays a number, to skip its term."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise UserError(f"{name} asks for gradient, but weights carry none: detach it")
    elif isinstance(value, (int, float)):
        return float(value)
    else:
        value = torch.tensor(value, dtype=torch.float32, device=logits_SBC.device)
    if value.dim() and value.shape != logits_SBC.shape[:1]:
        raise UserError(
            f"{name} has shape {list(value.shape)}: it must be a number or [{logits_SBC.shape[0]}]"
        )
    return value


def _cross_entropy(logits_SBC: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    """CE of each student and sample, ``[S, B]``; NaN where a label is out of range."""
    log_p_SBC = F.log_softmax(logits_SBC, dim=-1)
    if labels_B.dim() == 2:
        picked_SB = (labels_B.to(log_p_SBC.dtype) * log_p_SBC).sum(-1)
    else:
        C = log_p_SBC.shape[-1]
        valid_B = (labels_B >= 0) & (labels_B < C)
        index_SB1 = labels_B.clamp(0, C - 1).long().expand(log_p_SBC.shape[:2])[..., None]
        # Multiplied, not selected: the sample's gradient must be NaN as its loss is.
        poison_B = torch.where(valid_B, 1.0, math.nan).to(log_p_SBC.dtype)
        picked_SB = log_p_SBC.gather(-1, index_SB1).squeeze(-1) * poison_B
    return -(1.0 - smoothing) * picked_SB - smoothing * log_p_SBC.mean(-1)


def _torch_impl(
    logits_SBC: Tensor,
    labels_B: Tensor,
    scores: Tensor,
    extra_logits_EBC: Tensor | None,
    ce_weight: Tensor | float,
    kd_weight: Tensor | float,
    mixture_ce_weight: Tensor | float,
    temperature: float | Tensor,
    mix: str,
    detach_targets: bool,
    label_smoothing: float,
) -> MixtureLoss:
    """The readable reference; float64 where any input is, else float32."""
    inputs = [logits_SBC, scores] + ([] if extra_logits_EBC is None else [extra_logits_EBC])
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    z_SBC = logits_SBC.to(dtype)
    B = z_SBC.shape[1]
    sources_NBC = (
        z_SBC if extra_logits_EBC is None else torch.cat([z_SBC, extra_logits_EBC.to(dtype)])
    )
    scores_SNB = (scores[None] if scores.dim() == 2 else scores).to(dtype).permute(1, 2, 0)

    listens_SNB1 = (scores_SNB != -math.inf)[..., None]
    has_target_SB1 = listens_SNB1.any(1)
    # Both are selected before they are used, so that what nobody hears stays out of the gradient
    # too, where 0 * NaN would be NaN.
    heard_SNBC = torch.where(listens_SNB1, sources_NBC, 0.0)
    scores_SNB = torch.where(has_target_SB1[:, None, :, 0], scores_SNB, 0.0)

    ce_SB = _cross_entropy(z_SBC, labels_B, label_smoothing)
    log_q_SBC = F.log_softmax(torch.where(has_target_SB1, z_SBC, 0.0) / temperature, dim=-1)
    kd_SB = _divergence(
        scores_SNB.detach() if detach_targets else scores_SNB,
        heard_SNBC.detach() if detach_targets else heard_SNBC,
        log_q_SBC,
        temperature,
        mix,
    )
    kd_SB = torch.where(has_target_SB1[..., 0], kd_SB * temperature**2, 0.0)

    count = max(B, 1)
    ce_S, kd_S = ce_SB.sum(-1) / count, kd_SB.sum(-1) / count
    total = (ce_weight * ce_S + kd_weight * kd_S).sum()
    if isinstance(mixture_ce_weight, Tensor) or mixture_ce_weight != 0:
        mixed_SBC = (F.softmax(scores_SNB, dim=1)[..., None] * heard_SNBC).sum(1)
        mixture_SB = _cross_entropy(mixed_SBC, labels_B, label_smoothing)
        mixture_SB = torch.where(has_target_SB1[..., 0], mixture_SB, 0.0)
        total = total + (mixture_ce_weight * mixture_SB.sum(-1) / count).sum()
    return MixtureLoss(total, ce_S.detach(), kd_S.detach())


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
