"""The operators under the two fused losses: their schemas, and how autograd takes their gradients.

An operator returns the loss and, beside it, the gradients that were asked for, for an incoming
gradient of 1; the backward only multiplies them. Conventions that every implementation keeps:

- A weight is ``number * tensor``, the tensor None, 0-d or ``[S]``: a plain number costs no launch,
  and what changes from step to step stays on the device. So is the temperature.
- ``total`` is 0-d, ``ce_S`` and ``kd_S`` are batch means; all fp32. Sums over the batch are taken in
  an order that doesn't depend on the number of threads.
- Gradients of logits are in their input's dtype, but fp32 for an fp16 input: under a GradScaler
  most would round to 0 before the incoming 65,536 has scaled them. Gradients of scores, queries and
  keys are fp32, contiguous, in the input's shape: those of unbatched scores are already summed over
  the batch. ``[0]`` where not asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastokd.ops import _cpp
from fastokd.ops._library import LIBRARY, define

MAX_SOURCES = 16
"""Students and extras together, in the fused kernels."""

_WEIGHTS = "Tensor? ce_weight_S, Tensor? kd_weight_S, "
_OPTIONS = "str mix, bool detach_targets, float label_smoothing, "
_LOSSES = "Tensor total, Tensor ce_S, Tensor kd_S, "


def _losses(logits_SBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S = logits_SBC.shape[0]
    new = logits_SBC.new_empty
    return (
        new((), dtype=torch.float32),
        new(S, dtype=torch.float32),
        new(S, dtype=torch.float32),
    )


def empty_gradient(x: Tensor | None, asked: bool) -> Tensor:
    """Where an operator writes the gradient of the logits or extras ``x``."""
    if x is None or not asked:
        return torch.empty(0, device=None if x is None else x.device)
    if x.device.type == "cuda":
        from fastokd.kernels._layout import empty_gradient

        return empty_gradient(x)
    return torch.empty(
        x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device
    )


def _fp32(x: Tensor, asked: bool) -> Tensor:
    return torch.empty(x.shape if asked else 0, dtype=torch.float32, device=x.device)


def _mixture_fake(*args: Any) -> tuple[Tensor, ...]:
    logits_SBC, extra_EBC, _, scores = args[:4]
    grad_logits, grad_extra, grad_scores = args[-3:]
    return (
        *_losses(logits_SBC),
        empty_gradient(logits_SBC, grad_logits),
        logits_SBC.new_empty(0, dtype=torch.float32)
        if extra_EBC is None
        else empty_gradient(extra_EBC, grad_extra),
        _fp32(scores, grad_scores),
    )


def _peer_fake(*args: Any) -> tuple[Tensor, ...]:
    logits_SBC, _, query_BPd, key_BPd = args[:4]
    grad_logits, grad_query, grad_key = args[-3:]
    return (
        *_losses(logits_SBC),
        empty_gradient(logits_SBC, grad_logits),
        _fp32(query_BPd, grad_query),
        _fp32(key_BPd, grad_key),
    )


define(
    "mixture_distillation(Tensor logits_SBC, Tensor? extra_EBC, Tensor labels, Tensor scores, "
    f"{_WEIGHTS} Tensor? mixture_ce_weight_S, Tensor? temperature_0d, "
    f"float ce_weight, float kd_weight, float mixture_ce_weight, float temperature, {_OPTIONS}"
    f"bool grad_logits, bool grad_extra, bool grad_scores) -> ({_LOSSES}"
    "Tensor grad_logits_SBC, Tensor grad_extra_EBC, Tensor grad_scores)",
    _mixture_fake,
)
define(
    "peer_attention_distillation(Tensor logits_SBC, Tensor labels, Tensor query_BPd, "
    f"Tensor key_BPd, {_WEIGHTS} Tensor? temperature_0d, "
    f"float ce_weight, float kd_weight, float temperature, {_OPTIONS}"
    f"bool grad_logits, bool grad_query, bool grad_key) -> ({_LOSSES}"
    "Tensor grad_logits_SBC, Tensor grad_query_BPd, Tensor grad_key_BPd)",
    _peer_fake,
)
# The same as an eager step on the CPU calls it: with its gradients, in C++ alone.
LIBRARY.define(
    "mixture_loss(Tensor logits_SBC, Tensor? extra_EBC, Tensor labels, Tensor scores, "
    f"{_WEIGHTS} Tensor? mixture_ce_weight_S, Tensor? temperature_0d, "
    "float ce_weight, float kd_weight, float mixture_ce_weight, float temperature, "
    f"{_OPTIONS[:-2]}) -> (Tensor total, Tensor ce_S, Tensor kd_S)"
)
LIBRARY.define(
    "peer_attention_loss(Tensor logits_SBC, Tensor labels, Tensor query_BPd, Tensor key_BPd, "
    f"{_WEIGHTS} Tensor? temperature_0d, float ce_weight, float kd_weight, float temperature, "
    f"{_OPTIONS[:-2]}) -> (Tensor total, Tensor ce_S, Tensor kd_S)"
)


def _launcher(op: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton launcher of ``op``; importing it imports triton, so only when it is called."""

    def launch(*args: Any) -> tuple[Tensor, ...]:
        module = importlib.import_module(f"fastokd.kernels.{op}")
        result: tuple[Tensor, ...] = module.launch(*args)
        return result

    return launch


_LAUNCHERS = {op: _launcher(op) for op in ("mixture_distillation", "peer_attention_distillation")}
_OPERATORS: dict[str, Callable[..., Any]] = {
    op: getattr(torch.ops.fastokd, op).default for op in _LAUNCHERS
}
for _op, _launch in _LAUNCHERS.items():
    LIBRARY.impl(_op, _launch, "CUDA")
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")  # see FusedLoss

EAGER_LOSSES: dict[str, Callable[..., Any]] = {
    "mixture_distillation": torch.ops.fastokd.mixture_loss.default,
    "peer_attention_distillation": torch.ops.fastokd.peer_attention_loss.default,
}
"""What an eager step on the CPU calls, see ``in_one_call``."""


def in_one_call(impl: str, logits_SBC: Tensor) -> bool:
    """Whether ``EAGER_LOSSES`` may be tried: C++ checks, computes and carries the gradients.

    Between two calls of the loss a whole step empties the caches: Python's checks would then take
    longer than the kernel. Where the C++ refuses, with a RuntimeError, they are made after all, and
    say why in a sentence or choose another implementation.
    """
    return (
        impl in ("auto", "cpp")
        and logits_SBC.is_cpu
        and _cpp.load() is None
        and not torch.compiler.is_compiling()
    )


def refusal(
    labels_B: Tensor, logits_SBC: Tensor, extra_EBC: Tensor | None, *others: Tensor
) -> str | None:
    """Why the fused kernels can't take these inputs, or None where they can."""
    sources = 0
    for x in (logits_SBC, extra_EBC, *others):
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"an input is {x.dtype}, and it computes in float32"
    for x in (logits_SBC, extra_EBC):
        if x is not None:
            sources += x.shape[0]
            if x.stride(2) != 1 and x.shape[2] > 1:
                return f"neighbouring classes are {x.stride(2)} elements apart, not 1"
    if sources > MAX_SOURCES:
        return f"there are {sources} sources, and it takes {MAX_SOURCES}"
    if labels_B.requires_grad:
        return "labels_B asks for gradient, which it doesn't compute"
    return None


def call_fused(
    op: str,
    impl: str,
    tensors: tuple[Tensor | None, ...],
    weights: tuple[Tensor | float, ...],
    options: tuple[str | bool | float, ...],
    leaves: tuple[tuple[int, bool], tuple[int, bool], tuple[int, bool]],
) -> tuple[Tensor, Tensor, Tensor]:
    """``total, ce_S, kd_S`` by the operator ``op``, differentiable in its leaves.

    ``weights`` hold the temperature last. A leaf is its place among ``tensors``, and whether the
    total depends on it.
    """
    asked = [False, False, False]
    if torch.is_grad_enabled():
        for i, (place, reached) in enumerate(leaves):
            leaf = tensors[place]
            asked[i] = reached and leaf is not None and leaf.requires_grad
    first = tensors[0]
    assert first is not None
    args = (
        *tensors,
        *[w if isinstance(w, Tensor) else None for w in weights],
        *[1.0 if isinstance(w, Tensor) else w for w in weights],
        *options,
        *asked,
    )
    # Triton's interpreter takes tensors of the CPU, whose operator is the C++ one.
    function = _LAUNCHERS[op] if impl == "triton" and not first.is_cuda else _OPERATORS[op]
    if not any(asked):
        total, ce_S, kd_S, *_ = function(*args)
        return total, ce_S, kd_S
    result: tuple[Tensor, Tensor, Tensor] = FusedLoss.apply(function, leaves, *args)
    return result


class FusedLoss(torch.autograd.Function):
    """``total, ce_S, kd_S`` of an operator whose gradients come with it.

    (csrc/mixture_autograd.cpp is its twin for eager steps on the CPU, which costs a step less.)

    ``args`` are the operator's arguments, the three flags that ask for gradients last; ``leaves``
    say which arguments they are about, in the order in which their gradients are returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., tuple[Tensor, ...]],
        leaves: tuple[tuple[int, bool], ...],
        *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, ce_S, kd_S, *gradients = function(*args)
        ctx.save_for_backward(*gradients)
        ctx.places = [
            (leaf[0], args[leaf[0]].dtype) if asked else None
            for leaf, asked in zip(leaves, args[-3:], strict=True)
        ]
        ctx.count = len(args)
        ctx.mark_non_differentiable(ce_S, kd_S)
        ctx.set_materialize_grads(False)
        return total, ce_S, kd_S

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = [None] * ctx.count
        if grad_total is not None:
            for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
                if place is not None:
                    gradients[place[0]] = scaled(saved, grad_total, place[1])
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [None if x is None else _differentiable_once(x) for x in gradients]
        return (None, None, *gradients)


def _differentiable_once(gradient: Tensor) -> Tensor:
    """The gradient, from which a further backward raises: by default it would count as constant."""
    error = torch._C._functions.DelayedError(
        b"the fused loss has no second derivative: impl='torch' has", 1
    )
    result: Tensor = error(gradient.detach().requires_grad_())
    return result


def scaled(saved: Tensor, grad_total: Tensor, dtype: torch.dtype) -> Tensor:
    """``saved * grad_total`` in ``dtype``, multiplied in fp32 on the device, in one pass.

    ``saved`` is no longer there afterwards, unless the graph is retained.
    """
    if torch.compiler.is_compiling() or type(grad_total) is not Tensor:
        return (saved.float() * grad_total).to(dtype)
    reusable = dtype == saved.dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
    # On the CPU a look at the number costs nothing, and most often it is 1.
    if reusable and grad_total.is_cpu and grad_total.item() == 1.0:
        return saved
    # One-dimensional, so that it takes part in type promotion: the product is rounded once.
    factor = grad_total.reshape(1)
    if reusable:
        return saved.mul_(factor)
    return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=dtype))
