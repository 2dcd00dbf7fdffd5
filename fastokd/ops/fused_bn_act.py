"""BatchNorm, an optional residual and an optional ReLU as one operation.

For each channel, over the n = B*H*W values x of a batch, with mean m and biased variance v:

    y = relu(weight * (x - m) / sqrt(v + eps) + bias + residual)

    running_mean <- (1 - momentum) running_mean + momentum m
    running_var  <- (1 - momentum) running_var  + momentum v n / (n - 1)
    num_batches_tracked <- num_batches_tracked + 1

that is, ``nn.BatchNorm2d``, ``+`` and ``relu``; in eval mode m and v are the running statistics. In
training, forward reads x twice, backward x and dy twice; the equations of the backward stand in
``csrc/fused_bn_act_kernel.h`` and ``kernels/fused_bn_act.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops import cpp
from fastokd.ops._library import define, operator
from fastokd.ops._maps import like
from fastokd.ops.dispatch import choose

DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def fused_bn_act(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    residual_BCHW: Tensor | None = None,
    relu: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """BatchNorm over the batch, plus ``residual_BCHW``, through a ReLU, ``[B, C, H, W]``.

    Args:
        x_BCHW: floating point, of any layout; the C++ takes float32 and bfloat16, the Triton form float16
            too, both channels-last.
        weight_C, bias_C: float32 even where x is bfloat16 (as under autocast), or None.
        running_mean_C, running_var_C: updated in place in training, or None for neither.
        num_batches_tracked: 0-d int64, counted up in place in training, or None.
        residual_BCHW: added before the ReLU; x's shape.
        relu: whether there is a ReLU. As in PyTorch NaN propagates, and the gradient at zero is 0.
        momentum: what the running statistics take of the batch's; None averages over all batches.
        training: False normalises by the running statistics.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``. The C++ and Triton forms need running
            statistics, in training a momentum, in eval mode a call without gradient. Under
            ``torch.compile`` the Triton form, and the C++ in eval mode, are PyTorch's, which the
            compiler fuses.
            ``"auto"`` takes PyTorch's for what these don't take.

    Returns:
        y, in x's dtype and layout (PyTorch's promotion where the residual has another dtype).
        The C++ and Triton forms are differentiable once.

    Raises:
        UserError: shapes that don't fit, one value a channel in training, an ``impl`` that can't
            serve the call.
    """
    _check(x_BCHW, weight_C, bias_C, running_mean_C, running_var_C, residual_BCHW, training)
    vectors = (weight_C, bias_C, running_mean_C, running_var_C)
    refusals: dict[str, str | None] = {}
    fast = impl if impl != "auto" else "triton" if x_BCHW.is_cuda else "cpp"
    if (fast == "triton" or not training) and torch.compiler.is_compiling():
        impl = "torch"
    elif fast in DTYPES:
        others = (num_batches_tracked, residual_BCHW, momentum, training)
        refusals[fast] = _refusal(fast, x_BCHW, vectors, *others)
    chosen = choose("fused_bn_act", impl, x_BCHW.device, refusals)
    if impl == "auto" and chosen == "cpp" and _slower(x_BCHW, relu or residual_BCHW is not None):
        chosen = "torch"
    if chosen == "cpp" and training:
        state = (*vectors, num_batches_tracked)
        options = (residual_BCHW, relu, momentum, eps)
        fused_BCHW: Tensor = torch.ops.fastokd.fused_bn_act(x_BCHW, *state, *options)[0]
        return fused_BCHW
    if chosen == "triton" and training:
        return FusedBnAct.apply(
            chosen, relu, momentum, eps, x_BCHW, *vectors, num_batches_tracked, residual_BCHW
        )
    if chosen != "torch":
        call = operator("fused_bn_act_eval", chosen, x_BCHW)
        normalised_BCHW: Tensor = call(x_BCHW, *vectors, residual_BCHW, relu, eps)
        return normalised_BCHW
    # The readable reference: what ``nn.BatchNorm2d``, ``+`` and ``relu`` do.
    average = 0.0 if momentum is None else momentum
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            average = 1.0 / float(num_batches_tracked)  # a read-back, as in nn.BatchNorm2d
    y_BCHW = F.batch_norm(
        x_BCHW,
        running_mean_C,
        running_var_C,
        weight_C,
        bias_C,
        training or running_mean_C is None,
        average,
        eps,
    )
    if residual_BCHW is not None:
        y_BCHW = y_BCHW + residual_BCHW
    return F.relu(y_BCHW) if relu else y_BCHW


def _slower(x_BCHW: Tensor, fuses: bool) -> bool:
    """Whether PyTorch is faster: without AVX-512, on large fp32 maps of many channels.

    Measured with FASTOKD_CPU_CAPABILITY=avx2 (docs/benchmarks.md). ``fuses``: there is more than a norm.
    """
    if x_BCHW.dtype != torch.float32 or x_BCHW.numel() < 1 << 20 or torch.compiler.is_compiling():
        return False
    return x_BCHW.shape[1] >= (256 if fuses else 64) and cpp.capability() in ("default", "avx2")


def norm_act(
    module: Any, x_BCHW: Tensor, residual_BCHW: Tensor | None, *, impl: str = "auto"
) -> Tensor:
    """``fused_bn_act`` with a ``NormAct``'s state."""
    return fused_bn_act(
        x_BCHW,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        residual_BCHW=residual_BCHW,
        relu=module.relu,
        momentum=module.momentum,
        eps=module.eps,
        training=module.training,
        impl=impl,
    )


def _check(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    residual_BCHW: Tensor | None,
    training: bool,
) -> None:
    """Raises where shapes or dtypes don't fit."""
    if x_BCHW.dim() != 4 or not x_BCHW.is_floating_point():
        raise UserError(
            f"x_BCHW is {x_BCHW.dtype} of shape {list(x_BCHW.shape)}: "
            "it must be floating point, [batch, channels, height, width]"
        )
    C = x_BCHW.shape[1]
    for vector_C, name in (
        (weight_C, "weight_C"),
        (bias_C, "bias_C"),
        (running_mean_C, "running_mean_C"),
        (running_var_C, "running_var_C"),
    ):
        if vector_C is not None and vector_C.shape != (C,):
            raise UserError(
                f"{name} has shape {list(vector_C.shape)}: it must be [{C}], as x has channels"
            )
    if (running_mean_C is None) != (running_var_C is None):
        raise UserError("one of running_mean_C and running_var_C is None: give both or neither")
    if residual_BCHW is not None and residual_BCHW.shape != x_BCHW.shape:
        raise UserError(
            f"residual_BCHW has shape {list(residual_BCHW.shape)}: it must be x's, "
            f"{list(x_BCHW.shape)}"
        )
    if not C:
        raise UserError(f"x_BCHW has shape {list(x_BCHW.shape)}: it must have a channel")
    if (training or running_mean_C is None) and x_BCHW.numel() == C:
        raise UserError(
            f"x_BCHW has shape {list(x_BCHW.shape)}, one value a channel: BatchNorm needs more in "
            "training, a larger batch for instance"
        )


def _refusal(
    fast: str,
    x_BCHW: Tensor,
    vectors: tuple[Tensor | None, ...],
    num_batches_tracked: Tensor | None,
    residual_BCHW: Tensor | None,
    momentum: float | None,
    training: bool,
) -> str | None:
    """Why the implementation ``fast`` can't take these arguments, or None."""
    if torch._C._are_functorch_transforms_active():
        return "it has no batching rule for torch.func.vmap"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    if not training:
        asking = (x_BCHW, *vectors, residual_BCHW)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in asking):
            return "in eval mode it has no gradient, and this call asks for one"
    elif momentum is None:
        return "it needs a momentum, and this is a cumulative average"
    dtype = x_BCHW.dtype
    if dtype not in DTYPES[fast]:
        taken = " and ".join(str(one).removeprefix("torch.") for one in DTYPES[fast])
        return f"it takes {taken}, not {dtype}"
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last) or x_BCHW.numel() == 0:
        return "it takes channels-last maps that are not empty"
    for vector_C in vectors:
        if vector_C is None:
            return "it needs a weight, a bias and running statistics"
        if vector_C.dtype != torch.float32 or not vector_C.is_contiguous():
            return "it needs a weight, a bias and running statistics that are contiguous float32"
    if num_batches_tracked is not None and num_batches_tracked.dtype != torch.int64:
        return f"it counts batches in int64, not {num_batches_tracked.dtype}"
    if residual_BCHW is not None and (
        residual_BCHW.dtype != dtype
        or not residual_BCHW.is_contiguous(memory_format=torch.channels_last)
    ):
        return "it takes a residual of x's dtype in channels-last"
    return None


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[1]
    kept = x.is_cuda and relu and residual is not None
    bits = x.new_empty((x.numel() // C, (C + 7) // 8) if kept else 0, dtype=torch.uint8)
    return torch.empty_like(x), weight.new_empty(4, C), bits


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    sign: Tensor | None,
    weight: Tensor,
    stats: Tensor,
    relu: bool,
    want_x: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = torch.empty_like(weight), torch.empty_like(weight)
    return like(x, want_x), *vectors, like(x, want_residual)


# ``stats``: the batch's mean, 1 / deviation, and what else a backward needs, a row each. ``bits``: on a
# GPU the mask of a residual's ReLU, a bit a value in rows of whole bytes. ``sign``: where the ReLU's
# mask comes from if not from x: y itself in C++, those bits in Triton.
define(
    "fused_bn_act(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, bool relu, "
    "float momentum, float eps) -> (Tensor y, Tensor stats, Tensor bits)",
    _fake,
    "fused_bn_act.fused_bn_act",
)
define(
    "fused_bn_act_backward(Tensor grad_y, Tensor x, Tensor? sign, Tensor weight, Tensor stats, "
    "bool relu, bool want_x, bool want_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    "fused_bn_act.fused_bn_act_backward",
)
define(
    "fused_bn_act_eval(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, "
    "Tensor running_var, Tensor? residual, bool relu, float eps) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    "fused_bn_act.fused_bn_act_eval",
)


class FusedBnAct(torch.autograd.Function):
    """``(impl, relu, momentum, eps, x, weight, bias, three statistics, residual) -> y``, for Triton.

    The C++ has an autograd formula in C++ (csrc/fused_bn_act.cpp): on a CPU a backward in Python
    takes longer than the smallest layers' arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: str, relu: bool, momentum: float, eps: float, *tensors: Tensor | None
    ) -> Tensor:
        x, weight, *_, residual = tensors
        assert x is not None
        y: Tensor
        y, stats, bits = operator("fused_bn_act", impl, x)(*tensors, relu, momentum, eps)
        torch.autograd.graph.increment_version([t for t in tensors[3:6] if t is not None])
        ctx.impl, ctx.relu = impl, relu
        ctx.save_for_backward(x, weight, stats, bits if relu and residual is not None else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats, bits = ctx.saved_tensors
        want_x, want_weight, want_bias, *_, want_residual = ctx.needs_input_grad[4:]
        masked = want_residual and ctx.relu
        grad_x = grad_weight = grad_bias = None
        grad_residual = grad_y if want_residual else None
        if want_x or want_weight or want_bias or masked:
            call = operator("fused_bn_act_backward", ctx.impl, x)
            options = (ctx.relu, want_x, masked)
            grad_x, grad_weight, grad_bias, g = call(grad_y, x, bits, weight, stats, *options)
            grad_residual = g if masked else grad_residual
        return (
            *(None, None, None, None),
            grad_x if want_x else None,
            grad_weight if want_weight else None,
            grad_bias if want_bias else None,
            *(None, None, None),
            grad_residual,
        )
