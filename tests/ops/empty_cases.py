"""Calls of every public op with one dimension of nothing, and what each implementation makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastokd import ops
from fastokd.errors import UserError
from fastokd.ops.conv import conv2d, conv_transpose2d
from fastokd.ops.correlation_distillation import correlation_losses
from fastokd.ops.decoupled_distillation import decoupled_losses
from fastokd.ops.max_pool import max_pool

Call = Callable[[str], tuple[Tensor, list[Tensor]]]
"""By an implementation's name: what is differentiated, and in what."""

WHOLE = {"S": 3, "B": 2, "C": 5, "E": 1, "d": 4, "M": 16, "H": 4, "W": 4}
"""Students, samples, classes, extra sources, width of a query, channels, height, width."""


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def maps(n: dict[str, int], dtype: torch.dtype = torch.float32) -> Tensor:
    x_BCHW = torch.randn(n["B"], n["H"], n["W"], n["M"]).permute(0, 3, 1, 2).to(dtype)
    return x_BCHW.requires_grad_()


def logits_and_labels(n: dict[str, int], soft: bool) -> tuple[Tensor, Tensor]:
    logits_SBC = leaf(n["S"], n["B"], n["C"])
    if soft:
        return logits_SBC, torch.rand(n["B"], n["C"])
    return logits_SBC, torch.zeros(n["B"], dtype=torch.long)


def mixture(n: dict[str, int], soft: bool = False, batched: bool = True) -> Call:
    logits_SBC, labels_B = logits_and_labels(n, soft)
    extra_EBC = leaf(n["E"], n["B"], n["C"])
    scores = leaf(*([n["B"]] if batched else []), n["S"], n["S"] + n["E"])
    leaves = [logits_SBC, extra_EBC, scores]
    return lambda impl: (
        ops.mixture_distillation(
            logits_SBC, labels_B, scores, extra_logits_EBC=extra_EBC, mixture_ce_weight=0.5,
            impl=impl,
        ).total,
        leaves,
    )  # fmt: skip


def peers(n: dict[str, int], leader: bool = True) -> Call:
    logits_SBC, labels_B = logits_and_labels(n, soft=False)
    query, key = (leaf(n["B"], max(n["S"] - leader, 0), n["d"]) for _ in range(2))
    return lambda impl: (
        ops.peer_attention_distillation(logits_SBC, labels_B, query, key, impl=impl).total,
        [logits_SBC, query, key],
    )


def to_target(n: dict[str, int], decoupled: bool) -> Call:
    logits_SBC, labels_B = logits_and_labels(n, soft=False)
    target_SBC = torch.randn(1, n["B"], n["C"])
    if decoupled:
        return lambda impl: (
            decoupled_losses(logits_SBC, target_SBC, labels_B, impl=impl).sum(),
            [logits_SBC],
        )
    return lambda impl: (
        correlation_losses(logits_SBC, target_SBC, impl=impl).sum(),
        [logits_SBC],
    )


def of_maps(op: Callable[..., Tensor], count: int) -> Callable[[dict[str, int]], Call]:
    def made(n: dict[str, int]) -> Call:
        given = [maps(n) for _ in range(count)]
        return lambda impl: (op(*given, impl=impl), given)

    return made


def fusion(n: dict[str, int]) -> Call:
    given, channels = [maps(n), maps(n)], 2 * n["M"]
    weight = leaf(channels, 1, 3, 3)

    def call(impl: str) -> tuple[Tensor, list[Tensor]]:
        return ops.fusion_step(given, weight, nn.BatchNorm2d(channels), impl=impl), [*given, weight]

    return call


def norm(n: dict[str, int]) -> Call:
    x, residual = maps(n), maps(n)

    def call(impl: str) -> tuple[Tensor, list[Tensor]]:
        one = nn.BatchNorm2d(n["M"])
        y_BCHW = ops.norm_act(_as_norm_act(one), x, residual, impl=impl)
        return y_BCHW, [x, residual]

    return call


def _as_norm_act(one: nn.BatchNorm2d) -> nn.BatchNorm2d:
    one.relu = True
    return one


def convolution(n: dict[str, int], transposed: bool = False) -> Call:
    x = maps(n, torch.bfloat16)
    weight = leaf(*((n["M"], 16) if transposed else (16, n["M"])), 3, 3, dtype=torch.bfloat16)
    if transposed:
        return lambda impl: (conv_transpose2d(x, weight, impl=impl), [x, weight])
    return lambda impl: (conv2d(x, weight, None, 1, 1, impl=impl), [x, weight])


OPS: dict[str, tuple[str, Callable[[dict[str, int]], Call]]] = {
    "mixture": ("SBCE", mixture),
    "mixture, soft labels": ("SBCE", lambda n: mixture(n, soft=True)),
    "mixture, one score for all": ("SBCE", lambda n: mixture(n, batched=False)),
    "peers": ("SBCd", peers),
    "peers without a leader": ("SBCd", lambda n: peers(n, leader=False)),
    "decoupled": ("SBC", lambda n: to_target(n, decoupled=True)),
    "correlation": ("SBC", lambda n: to_target(n, decoupled=False)),
    "attention_map": ("BMHW", of_maps(ops.attention_map, 1)),
    "attention_transfer": ("BMHW", of_maps(ops.attention_transfer, 2)),
    "attention_diversity": ("BMHW", of_maps(ops.attention_diversity, 2)),
    "feature_transfer": ("BMHW", of_maps(ops.feature_transfer, 2)),
    "shifted_map": ("BMHW", of_maps(ops.shifted_map, 1)),
    "fusion_step": ("BMHW", fusion),
    "fused_bn_act": ("BMHW", norm),
    "max_pool": ("BMHW", lambda n: of_maps(lambda x, impl: max_pool(x, 2, impl=impl), 1)(n)),
    "conv2d": ("BMHW", convolution),
    "conv_transpose2d": ("BMHW", lambda n: convolution(n, transposed=True)),
}
"""Of each op the dimensions that it has, and its call."""

LAYERS = ("max_pool", "conv2d", "conv_transpose2d")
CASES = [(op, dim) for op, (dims, _) in OPS.items() for dim in dims]


def outcome(op: str, dim: str, impl: str) -> Any:
    """The values and gradients of a call without ``dim``, or the sentence that refuses it."""
    torch.manual_seed(0)
    sizes = {**WHOLE, dim: 0}
    try:
        made = OPS[op][1](sizes)
        value, leaves = made(impl)
        if not value.requires_grad:
            return [value]
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)]
    except (UserError, RuntimeError) as error:
        # A convolution and a pooling say what torch says: no user calls them.
        if isinstance(error, RuntimeError) and op not in LAYERS:
            raise
        return str(error)


def assert_as_the_reference(op: str, dim: str, impl: str) -> None:
    """``impl`` gives what the reference gives, or a sentence; nothing where that has a sentence."""
    wanted, found = outcome(op, dim, "torch"), outcome(op, dim, impl)
    if isinstance(found, str):
        assert impl != "auto" or isinstance(wanted, str), found
        return
    assert not isinstance(wanted, str), f"{impl} gives a value, and torch says: {wanted}"
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None or not ours.numel()) == (theirs is None or not theirs.numel())
        if ours is not None and theirs is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-5
            )
