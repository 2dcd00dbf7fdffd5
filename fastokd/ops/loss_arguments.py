"""What the arguments of the fused losses must be, and which of them the fused kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.kernels.layout import Loss

MAX_SOURCES = 16
"""Students and extras together, in the fused kernels."""


def check(loss: Loss) -> None:
    """Raises where arguments don't fit; reads no tensor's values."""
    _check_logits(loss.logits_SBC, loss.labels_B)
    check_mix(loss.mix)
    if not 0.0 <= loss.label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {loss.label_smoothing}: it must be in [0, 1)")
    temperature = loss.temperature_0d
    if temperature is not None and (temperature.dim() or temperature.requires_grad):
        raise UserError("temperature must be a number or a 0-d tensor without gradient")
    if not (math.isfinite(loss.temperature) and loss.temperature > 0):
        raise UserError(f"temperature is {loss.temperature}: it must be a finite number above 0")
    if loss.key_BPd is None:
        _check_sources(loss)
    else:
        _check_peers(loss, loss.scores, loss.key_BPd)
    _check_samples(loss)
    S = loss.logits_SBC.shape[0]
    for name in ("ce_weight", "kd_weight", "mixture_ce_weight"):
        weight = getattr(loss, f"{name}_S")
        if weight is not None and weight.requires_grad:
            raise UserError(f"{name} asks for gradient, but weights carry none: detach it")
        if weight is not None and weight.dim() and weight.shape != (S,):
            raise UserError(f"{name} has shape {list(weight.shape)}: it must be a number or [{S}]")


def _check_logits(logits_SBC: Tensor, labels_B: Tensor) -> None:
    given = logits_SBC.shape
    if len(given) != 3 or not logits_SBC.is_floating_point() or not given[0] * given[2]:
        raise UserError(
            f"logits_SBC is {logits_SBC.dtype} of shape {list(given)}: it must be floating point, "
            "[students, batch, classes], of a student and a class at least"
        )
    _, B, C = given
    hard = labels_B.dim() == 1
    if labels_B.shape != ((B,) if hard else (B, C)) or hard == labels_B.is_floating_point():
        raise UserError(
            f"labels_B is {labels_B.dtype} of shape {list(labels_B.shape)}: "
            f"it must be integers [{B}] or floating point [{B}, {C}]"
        )


def _check_samples(loss: Loss) -> None:
    """Raises where the second labels, their shares or the samples' weights don't fit."""
    B = loss.logits_SBC.shape[1]
    labels2_B = loss.labels2_B
    if labels2_B is not None:
        if loss.labels_B.dim() == 2:
            raise UserError(
                "mixed_with is given beside soft labels [batch, classes]: mix those themselves, or give "
                "class ids [batch]"
            )
        if labels2_B.shape != (B,) or labels2_B.is_floating_point():
            raise UserError(
                f"labels2_B is {labels2_B.dtype} of shape {list(labels2_B.shape)}: it must be "
                f"integers [{B}]"
            )
    for name in ("share2_B", "sample_weight_B"):
        x = getattr(loss, name)
        if x is None:
            continue
        if x.shape != (B,) or not x.is_floating_point():
            raise UserError(
                f"{name} is {x.dtype} of shape {list(x.shape)}: it must be floating point [{B}]"
            )
        if x.requires_grad:
            raise UserError(f"{name} asks for gradient, but it carries none: detach it")


def check_mix(mix: str) -> None:
    """Raises where ``mix`` is none."""
    if mix not in ("logits", "probs", "pairwise"):
        raise UserError(f"mix is {mix!r}: choose logits, probs or pairwise")


def _check_sources(loss: Loss) -> None:
    S, B, C = loss.logits_SBC.shape
    E, extra_EBC, scores = 0, loss.extra_EBC, loss.scores
    if extra_EBC is not None:
        if extra_EBC.dim() != 3 or extra_EBC.shape[1:] != (B, C):
            raise UserError(
                f"extra_logits_EBC has shape {list(extra_EBC.shape)}: "
                f"it must be [extras, {B}, {C}], as the students' logits"
            )
        E = extra_EBC.shape[0]
    if scores.shape not in ((S, S + E), (B, S, S + E)) or not scores.is_floating_point():
        raise UserError(
            f"scores is {scores.dtype} of shape {list(scores.shape)}: it must be floating point, "
            f"[{S}, {S + E}] or [{B}, {S}, {S + E}] (students by sources)"
        )


def _check_peers(loss: Loss, query_BPd: Tensor, key_BPd: Tensor) -> None:
    S, B, _ = loss.logits_SBC.shape
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


def refusal(loss: Loss) -> str | None:
    """Why the fused kernels can't take these inputs, or None where they can."""
    for x in (loss.logits_SBC, loss.extra_EBC, loss.scores, loss.key_BPd):
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"an input is {x.dtype}, and it computes in float32"
    sources = 0
    for x in (loss.logits_SBC, loss.extra_EBC):
        if x is not None:
            sources += x.shape[0]
            if x.stride(2) != 1 and x.shape[2] > 1:
                return f"neighbouring classes are {x.stride(2)} elements apart, not 1"
    if sources > MAX_SOURCES:
        return f"there are {sources} sources, and it takes {MAX_SOURCES}"
    if loss.labels_B.requires_grad:
        return "labels_B asks for gradient, which it doesn't compute"
    return None
