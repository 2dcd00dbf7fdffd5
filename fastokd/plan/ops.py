"""A dispatched operator: its kind, FLOPs, bytes, matrix products and GPU launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Dispatched operators that run nothing: allocation, views, and queries of a tensor.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
    *("detach", "lift_fresh", "_unsafe_view", "_reshape_alias"),
    *("device", "_local_scalar_dense"),
}
# The arguments that an operator must read twice: a norm reads once for the statistics and once to
# normalise, its backward once for the sums and once for the gradient.
READ_TWICE = {
    **dict.fromkeys(("native_batch_norm", "fused_bn_act"), (0,)),
    **dict.fromkeys(("native_batch_norm_backward", "fused_bn_act_backward"), (0, 1)),
    **dict.fromkeys(("_log_softmax", "_softmax"), (0,)),
}
NORMS = {name for name in READ_TWICE if "softmax" not in name}
# Kernels of an operator on a GPU, where it is more than one. PyTorch's norm of channels-last maps has
# the statistics, their update and the normalisation, then sums and gradient; each pass over the
# batch also clears its counters (seen by a profiler on an H200). Its pooling's backward clears the
# gradient first. Our norm has partial sums and the normalisation, and as many backward. Our losses:
# every sample or map, then the sum; DIST's samples, classes and gradient.
KERNELS = {
    **{"native_batch_norm": 4, "native_batch_norm_backward": 3},
    "max_pool2d_with_indices_backward": 2,
    **dict.fromkeys(("fused_bn_act", "fused_bn_act_backward"), 2),
    **dict.fromkeys(("mixture_distillation", "peer_attention_distillation"), 2),
    **dict.fromkeys(("attention_pair", "feature_pair"), 2),
    **{"decoupled_distillation": 2, "correlation_distillation": 3},
}
REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "max", "min", "argmin", "argmax", "topk"),
    *("linalg_vector_norm", "norm", "mse_loss", "nll_loss_forward"),
    *("_log_softmax", "_softmax", "_softmax_backward_data", "_log_softmax_backward_data"),
}
# Limits of one launch of torch's multi-tensor kernels: tensors, by the number of lists, and blocks
# of 65,536 elements (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_A_LAUNCH = (110, 64, 48, 36, 30)
BLOCKS_A_LAUNCH, BLOCK = 320, 65536
MULTI_TENSOR = ("_foreach_", "_fused_", "_amp_foreach_")
TENSORS_A_CAT = 128


@dataclass(frozen=True)
class Product:
    """``count`` matrix products ``[m, k] @ [k, n]``; a convolution is a product over its windows."""

    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Op:
    """One operator of a step.

    ``phase``: forward, backward or optimizer. ``layer``: the module that it belongs to, or "".
    ``kind``: product, norm, pool, reduction, pointwise, loss or optimizer. ``bytes``: required reads and
    writes. ``launches``: kernels on a GPU.
    """

    name: str
    phase: str
    layer: str
    kind: str
    flops: int
    bytes: int
    launches: int
    products: tuple[Product, ...] = ()
    dtype: torch.dtype = torch.float32


def describe(func: Any, args: Any, kwargs: Any, out: Any, phase: str, layer: str) -> Op | None:
    """The operator as an :class:`Op`; None if it runs nothing."""
    name = func._schema.name.split("::")[1]
    if func.is_view or name in FREE or func.namespace in ("prim", "profiler"):
        return None
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    twice = [args[i] for i in READ_TWICE.get(name, ()) if not _evaluates(name, args)]
    read, written = _bytes(tensors) + _bytes(twice), _bytes(results)
    if name == "fused_bn_act_backward" and args[2] is not None:  # a GPU reads the mask's bits
        read -= args[2].nbytes - args[2].numel() // 8
    if name.endswith("_") and not name.endswith("__") and not results:
        written = read
    products = _products(func, args, out)
    flops = sum(product.flops for product in products)
    widest = max([*tensors, *results], key=lambda x: x.numel(), default=None)
    return Op(
        name,
        phase,
        layer,
        _kind(name, func.namespace, bool(products), phase),
        flops,
        read + written,
        _launches(func, name, args),
        products,
        torch.float32 if widest is None else widest.dtype,
    )


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors; views of the same memory count once, without expanded dimensions."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape): x for x in tensors}
    return sum(
        x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)
        for x in seen.values()
    )


def _kind(name: str, namespace: str, has_products: bool, phase: str) -> str:
    if phase == "optimizer":
        return "optimizer"
    if has_products:
        return "product"
    if name in NORMS:
        return "norm"
    if "pool" in name:
        return "pool"
    if namespace == "fastokd":
        return "loss"
    return "reduction" if name in REDUCTIONS else "pointwise"


def _launches(func: Any, name: str, args: Any) -> int:
    if name.startswith(MULTI_TENSOR):
        lists = [x for x in args if isinstance(x, (list, tuple)) and len(x)]
        lists = [x for x in lists if isinstance(x[0], Tensor) and x[0].dim() > 0]
        if not lists:
            return 1
        blocks = sum(math.ceil(x.numel() / BLOCK) for x in lists[0])
        limit = TENSORS_A_LAUNCH[min(len(lists), 5) - 1]
        return max(math.ceil(len(lists[0]) / limit), math.ceil(blocks / BLOCKS_A_LAUNCH))
    if func is aten.convolution_backward.default:
        return sum(args[10]) + args[10][1]  # a weight's gradient also clears or sums a workspace
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / TENSORS_A_CAT)
    if _evaluates(name, args):
        return 2  # a deviation's reciprocal, and the normalisation
    if name.startswith("native_batch_norm") and args[0].is_contiguous():
        return 1  # cuDNN's
    return KERNELS.get(name, 1)


def _evaluates(name: str, args: Any) -> bool:
    """Whether this is PyTorch's norm by its running statistics."""
    return name == "native_batch_norm" and not args[5]


def _products(func: Any, args: Any, out: Any) -> tuple[Product, ...]:
    """The matrix products of convolutions and linear layers, forward and backward."""
    if func is aten.convolution.default:
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        return (_convolution(x, weight, out, transposed, groups),)
    if func is aten.convolution_backward.default:
        grad, x, weight = args[0], args[1], args[2]
        transposed, groups, wanted = args[7], args[9], args[10]
        forward = _convolution(x, weight, grad, transposed, groups)
        rows, outputs, window = forward.m, forward.n, forward.k
        taps = weight.shape[2:].numel()
        for_input = Product(rows, window // taps, outputs * taps, groups)
        for_weight = Product(window, outputs, rows, groups)
        both = zip((for_input, for_weight), wanted[:2], strict=True)
        return tuple(product for product, asked in both if asked)
    if func.overloadpacket in flop_registry:
        shapes = [x.shape for x in args if isinstance(x, Tensor)][-2:]
        if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) and len(shapes[0]) in (2, 3):
            a, b = shapes
            return (Product(a[-2], b[-1], a[-1], a[0] if len(a) == 3 else 1),)
    return ()


def _convolution(x: Tensor, weight: Tensor, y: Tensor, transposed: bool, groups: int) -> Product:
    taps = weight.shape[2:].numel()
    if transposed:  # one window per input pixel, spread over its outputs
        pixels = x.shape[0] * x.shape[2:].numel()
        return Product(pixels, weight.shape[1], weight.shape[0] // groups * taps, groups)
    pixels = y.shape[0] * y.shape[2:].numel()
    return Product(pixels, weight.shape[0] // groups, weight.shape[1] * taps, groups)
