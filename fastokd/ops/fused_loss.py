"""The operator under the two fused losses: its arguments, checks, schema and autograd formula.

It returns the loss and the gradients that were asked for, for an incoming gradient of 1; the
backward multiplies them. Every implementation keeps these conventions:

- ``total`` is 0-d, ``ce_S`` and ``kd_S`` are batch means; all fp32. Sums over the batch are taken in
  an order that doesn't depend on the number of threads.
- Gradients of logits are in their input's dtype, but fp32 for an fp16 input: under a GradScaler
  most would round to 0 before the incoming 65,536 scales them. Gradients of scores, queries and
  keys are fp32, contiguous, in the input's shape: those of unbatched scores are already summed over
  the batch. ``[0]`` where not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.kernels.layout import Loss, empty_gradient, gradient_dtype
from fastokd.ops._library import LIBRARY, define, operator
from fastokd.ops.dispatch import choose

Mix = Literal["logits", "probs", "pairwise"]
Weight = float | Sequence[float] | Tensor

MAX_SOURCES = 16
"""Students and extras together, in the fused kernels."""


class MixtureLoss(NamedTuple):
    """``total`` carries gradient; ``ce_S`` and ``kd_S`` are detached batch means, fp32."""

    total: Tensor
    ce_S: Tensor
    kd_S: Tensor


def packed(
    logits_SBC: Tensor,
    extra_EBC: Tensor | None,
    labels_B: Tensor,
    scores: Tensor,
    key_BPd: Tensor | None,
    weights: tuple[Weight, Weight, Weight, float | Tensor],
    *options: Any,
) -> Loss:
    """The arguments of a call; ``weights`` are of CE, KD and mixture CE, and the temperature."""
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    for value in weights:
        if isinstance(value, (int, float)):
            tensors.append(None)
            numbers.append(float(value))
        else:
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.float32, device=logits_SBC.device)
            tensors.append(value)
            numbers.append(1.0)
    return Loss(logits_SBC, extra_EBC, labels_B, scores, key_BPd, *tensors, *numbers, *options)  # type: ignore[arg-type]


_passed: dict[tuple[Any, ...], str | None] = {}
"""Signatures that have passed the checks, each with the fused kernels' refusal if there is one."""


def implementation(op: str, impl: str, loss: Loss) -> str:
    """Checks the arguments, and chooses what serves them.

    What the checks read (shapes, dtypes, strides of logits, requires_grad, options; no values of
    tensors) is the call's signature: one that has passed is not checked again.
    """
    if torch.compiler.is_compiling():
        _check(loss)
        reason = _refusal(loss)
    else:
        extra_EBC = loss.extra_EBC
        signature = (
            loss.logits_SBC.stride(),
            None if extra_EBC is None else extra_EBC.stride(),
            loss[12:16],
            *[None if x is None else (x.shape, x.dtype, x.requires_grad) for x in loss[:9]],
        )
        if signature not in _passed:
            _check(loss)
            if len(_passed) >= 64:
                _passed.clear()
            _passed[signature] = _refusal(loss)
        reason = _passed[signature]
    return choose(op, impl, loss.logits_SBC.device, {"cpp": reason, "triton": reason})


def _check(loss: Loss) -> None:
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


def _refusal(loss: Loss) -> str | None:
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


def _fake(*args: Any) -> tuple[Tensor, ...]:
    loss = Loss(*args)
    z_SBC, S = loss.logits_SBC, loss.logits_SBC.shape[0]

    def fp32(*shape: int) -> Tensor:
        return z_SBC.new_empty(shape, dtype=torch.float32)

    def gradient(x: Tensor | None, asked: bool, rows: bool) -> Tensor:
        if x is None or not asked:
            return fp32(0)
        if rows and x.device.type == "cuda":
            return empty_gradient(x)
        return x.new_empty(x.shape, dtype=gradient_dtype(x) if rows else torch.float32)

    return (
        *(fp32(), fp32(S), fp32(S)),
        gradient(z_SBC, loss.grad_logits, True),
        gradient(loss.extra_EBC, loss.grad_extra, True),
        gradient(loss.scores, loss.grad_scores, False),
        gradient(loss.key_BPd, loss.grad_key, False),
    )


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", str: "str", bool: "bool"}
_FIELDS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Loss).items())
# One operator by two names, so that a profile tells the two losses apart.
for _op in ("mixture_distillation", "peer_attention_distillation"):
    define(
        f"{_op}({_FIELDS}) -> (Tensor total, Tensor ce_S, Tensor kd_S, Tensor grad_logits_SBC, "
        "Tensor grad_extra_EBC, Tensor grad_scores, Tensor grad_key_BPd)",
        _fake,
        "mixture_distillation.mixture_distillation",
    )
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")  # see FusedLoss


def fused_loss(op: str, impl: str, loss: Loss) -> MixtureLoss:
    """The loss by the operator ``op``, differentiable once in its leaves."""
    function = operator(op, impl, loss.logits_SBC)
    z_SBC, extra_EBC, _, scores, key_BPd, *_ = loss
    if torch.is_grad_enabled():
        to_targets = not loss.detach_targets or loss.has_mixture_ce
        asks = (
            z_SBC.requires_grad,
            to_targets and extra_EBC is not None and extra_EBC.requires_grad,
            to_targets and scores.requires_grad,
            to_targets and key_BPd is not None and key_BPd.requires_grad,
        )
        if True in asks:
            total, ce_S, kd_S, *gradients = function(*loss[:16], *asks)
            leaves = (z_SBC, extra_EBC, scores, key_BPd)
            return MixtureLoss(FusedLoss.apply((total, *gradients), asks, *leaves), ce_S, kd_S)
    return MixtureLoss._make(function(*loss)[:3])


class FusedLoss(torch.autograd.Function):
    """``((total, its gradients in the leaves), which leaves ask, *leaves) -> total``."""

    @staticmethod
    def forward(
        ctx: Any, results: tuple[Tensor, ...], asks: tuple[bool, ...], *leaves: Tensor | None
    ) -> Tensor:
        total, *gradients = results
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [
            leaf.dtype if leaf is not None and asked else None
            for leaf, asked in zip(leaves, asks, strict=True)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:
        gradients = _scaled(ctx.saved_tensors, grad_total, ctx.dtypes)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [None if x is None else _differentiable_once(x) for x in gradients]
        return None, None, *gradients


def _scaled(
    gradients: tuple[Tensor, ...], grad_total: Tensor, dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    """``gradients * grad_total`` in ``dtypes``, multiplied in fp32 on the device, each in one pass.

    They are overwritten, unless the graph is retained.
    """
    pairs = zip(gradients, dtypes, strict=True)
    if torch.compiler.is_compiling() or type(grad_total) is not Tensor:
        return [None if t is None else (x.float() * grad_total).to(t) for x, t in pairs]
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    # On the CPU reading the number is no synchronisation, and most often it is 1.
    one = not keep and grad_total.is_cpu and grad_total.item() == 1.0
    found: list[Tensor | None] = []
    for x, dtype in pairs:
        if dtype is None:
            found.append(None)
        elif one and dtype == x.dtype:
            found.append(x)
        else:
            out = torch.empty_like(x, dtype=dtype) if keep or dtype != x.dtype else x
            # One-dimensional, so that it takes part in type promotion: the product is rounded once.
            found.append(torch.mul(x, grad_total.reshape(1), out=out))
    return found


def _differentiable_once(gradient: Tensor) -> Tensor:
    """The gradient, from which a further backward raises: by default it would count as constant."""
    error = torch._C._functions.DelayedError(
        b"the fused loss has no second derivative: impl='torch' has", 1
    )
    result: Tensor = error(gradient.detach().requires_grad_())
    return result
