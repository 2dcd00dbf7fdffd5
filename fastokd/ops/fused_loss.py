"""The operator under the two fused losses: its schema and autograd formula.

It returns the loss and the gradients that were asked for, for an incoming gradient of 1; the
backward multiplies them, except where it receives :func:`unit_gradient`. Every implementation keeps these conventions:

- ``total`` is 0-d, ``ce_S`` and ``kd_S`` are batch means; all fp32. Sums over the batch are taken in
  an order that doesn't depend on the number of threads.
- Gradients of logits are in their input's dtype, but fp32 for an fp16 input: under a GradScaler
  most would round to 0 before the incoming 65,536 scales them. Gradients of scores, queries and
  keys are fp32, contiguous, in the input's shape: those of unbatched scores are already summed over
  the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor

from fastokd.kernels.layout import Loss, empty_gradient, gradient_dtype
from fastokd.ops._library import LIBRARY, Operator, define, operator
from fastokd.ops.dispatch import choose
from fastokd.ops.loss_arguments import check, refusal

Mix = Literal["logits", "probs", "pairwise"]
Weight = float | Sequence[float] | Tensor


class MixtureLoss(NamedTuple):
    """``total`` carries gradient; ``ce_S`` and ``kd_S`` are detached batch means, fp32."""

    total: Tensor
    ce_S: Tensor
    kd_S: Tensor


class Route(NamedTuple):
    """What serves a call: ``function`` is None where the reference does."""

    function: Operator | None
    asks: tuple[bool, ...] = (False,) * 4
    """Which gradients of logits, extras, scores (or queries) and keys are computed."""
    leaves: tuple[int, ...] = ()
    """The places in ``Loss`` of those that ask."""
    dtypes: tuple[torch.dtype, ...] = ()


_routes: dict[tuple[Any, ...], Route] = {}


def fused_loss(
    op: str,
    impl: str,
    reference: Callable[[Loss], MixtureLoss],
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None],
    weights: tuple[Weight, Weight, Weight, float | Tensor],
    *options: Any,
    mixed_with: tuple[Tensor, Tensor] | None = None,
    sample_weight_B: Tensor | None = None,
) -> MixtureLoss:
    """The loss by the operator ``op`` or by ``reference``, differentiable once in its leaves.

    ``inputs`` and ``options`` are fields of ``Loss``; ``weights`` are of CE, KD and mixture CE, and
    the temperature; ``mixed_with`` is ``(labels2_B, share2_B)``. All that the checks and the choice read
    (shapes, dtypes, strides, requires_grad, options; no values of tensors) is the call's signature: one
    that has passed is not checked again.
    """
    tensors: list[Any] = []
    numbers: list[float] = []
    for value in weights:
        if isinstance(value, (int, float)):
            tensors.append(None)
            numbers.append(float(value))
        else:
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.float32, device=inputs[0].device)
            tensors.append(value)
            numbers.append(1.0)
    loss = Loss(*inputs, *tensors, *numbers, *options)
    rare: tuple[Tensor | None, ...] = ()
    if mixed_with is not None or sample_weight_B is not None:
        rare = (*(mixed_with or (None, None)), sample_weight_B)
        loss = loss._replace(labels2_B=rare[0], share2_B=rare[1], sample_weight_B=rare[2])
    if torch.compiler.is_compiling():
        route = _route(op, impl, loss)
    else:
        z_SBC, extra_EBC, labels_B, scores, key_BPd = inputs
        signature = (
            *(op, impl, torch.is_grad_enabled(), numbers[2] != 0.0, numbers[3], options),
            *(z_SBC.shape, z_SBC.stride(), z_SBC.dtype, z_SBC.device, z_SBC.requires_grad),
            *(labels_B.shape, labels_B.dtype, labels_B.requires_grad),
            *(scores.shape, scores.dtype, scores.requires_grad),
            extra_EBC if extra_EBC is None else _signature(extra_EBC),
            key_BPd if key_BPd is None else _signature(key_BPd),
            *[x if x is None else _signature(x) for x in (*tensors, *rare)],
        )
        try:
            route = _routes[signature]
        except KeyError:
            route = _route(op, impl, loss)
            if route.function is not None:  # what is missing today may be there tomorrow
                if len(_routes) >= 64:
                    _routes.clear()
                _routes[signature] = route
    function, asks, leaves, dtypes = route
    if function is None:
        return reference(loss)
    total, ce_S, kd_S, gradients = function(*loss[:16], *asks, *rare)
    if leaves:
        total = FusedLoss.apply((total, gradients, dtypes), *[loss[i] for i in leaves])
    return MixtureLoss(total, ce_S, kd_S)


def _signature(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.requires_grad


def _route(op: str, impl: str, loss: Loss) -> Route:
    """Checks the arguments and chooses an implementation."""
    check(loss)
    reason = refusal(loss)
    impl = choose(op, impl, loss.logits_SBC.device, {"cpp": reason, "triton": reason})
    if impl == "torch":
        return Route(None)
    function = operator(op, impl, loss.logits_SBC)
    if not torch.is_grad_enabled():
        return Route(function)
    to_targets = not loss.detach_targets or loss.has_mixture_ce
    asks, leaves, dtypes = [], [], []
    for place, reached in ((0, True), (1, to_targets), (3, to_targets), (4, to_targets)):
        x = loss[place]
        asks.append(reached and x is not None and x.requires_grad)
        if asks[-1]:
            leaves.append(place)
            dtypes.append(x.dtype)
    return Route(function, tuple(asks), tuple(leaves), tuple(dtypes))


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    loss = Loss(*args)
    z_SBC, S = loss.logits_SBC, loss.logits_SBC.shape[0]

    def gradient(x: Tensor, rows: bool) -> Tensor:
        if rows and x.device.type == "cuda":
            return empty_gradient(x)
        return x.new_empty(x.shape, dtype=gradient_dtype(x) if rows else torch.float32)

    leaves = (z_SBC, loss.extra_EBC, loss.scores, loss.key_BPd)
    asked = [
        gradient(x, place < 2)
        for place, (x, ask) in enumerate(zip(leaves, loss[16:20], strict=True))
        if x is not None and ask
    ]
    total, ce_S, kd_S = (z_SBC.new_empty(n, dtype=torch.float32) for n in ((), S, S))
    return total, ce_S, kd_S, asked


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", str: "str", bool: "bool"}
_RARE = ("labels2_B", "share2_B", "sample_weight_B")
"""What a plain call leaves out."""
_FIELDS = ", ".join(
    f"{_TYPES[kind]} {name}{'=None' if name in _RARE else ''}"
    for name, kind in get_type_hints(Loss).items()
)
# One operator by two names, so that a profile tells the two losses apart.
for _op in ("mixture_distillation", "peer_attention_distillation"):
    define(
        f"{_op}({_FIELDS}) -> (Tensor total, Tensor ce_S, Tensor kd_S, Tensor[] gradients)",
        _fake,
        "mixture_distillation.mixture_distillation",
    )
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")  # see FusedLoss


def unit_gradient(total: Tensor) -> Tensor:
    """A gradient of 1 for ``total.backward``.

    A fused loss knows this tensor itself, so it needs neither a product nor a look at the value. Where
    the total is scaled first, autograd makes another tensor, which is multiplied by. Each backward has
    its own: a parameter's gradient may keep it, and a hook may write to it.
    """
    unit = torch.ones_like(total)
    unit.is_unit_gradient = True  # type: ignore[attr-defined]
    return unit


class FusedLoss(torch.autograd.Function):
    """``((total, gradients, dtypes of leaves), *leaves) -> total``."""

    @staticmethod
    def forward(ctx: Any, results: tuple[Any, ...], *leaves: Tensor) -> Tensor:
        total: Tensor
        total, gradients, ctx.dtypes = results
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients times the incoming one, each in one pass over it, or in none.

        They are overwritten or given away, unless the graph is retained.
        """
        gradients = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        # What counts operators, a dispatch mode or fake tensors, sees the product, as on a GPU.
        fake = compiling or type(grad_total) is not Tensor
        counted = fake or torch._C._len_torch_dispatch_stack()
        keep = compiling or torch._C._autograd._get_current_graph_task_keep_graph()
        unit = getattr(grad_total, "is_unit_gradient", False) and grad_total._version == 0
        # On the CPU reading the number is no synchronisation, and most often it is 1.
        unit = unit or (not counted and grad_total.is_cpu and grad_total.item() == 1.0)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        if compiling:
            gradients = [(x.float() * grad_total).to(dtype) for x, dtype in pairs]
        elif unit and not keep:
            gradients = _cast(gradients, ctx.dtypes)
        else:
            gradients = [_scaled(x, grad_total, dtype, keep) for x, dtype in pairs]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [_differentiable_once(x) for x in gradients]
        return None, *gradients


def _scaled(x: Tensor, grad_total: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    out = torch.empty_like(x, dtype=dtype) if keep or dtype != x.dtype else x
    # One-dimensional, so that it takes part in type promotion: the product is rounded once.
    return torch.mul(x, grad_total.reshape(1), out=out)


def _cast(gradients: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """The gradients in their leaves' dtypes: at most one launch."""
    pairs = list(zip(gradients, dtypes, strict=True))
    outs = [x if x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x, dtype in pairs]
    changed = [(out, x) for out, x in zip(outs, gradients, strict=True) if out is not x]
    if changed:
        torch._foreach_copy_([out for out, _ in changed], [x for _, x in changed])
    return outs


def _differentiable_once(gradient: Tensor) -> Tensor:
    """The gradient, from which a further backward raises: by default it would count as constant."""
    error = torch._C._functions.DelayedError(
        b"the fused loss has no second derivative: impl='torch' has", 1
    )
    result: Tensor = error(gradient.detach().requires_grad_())
    return result
