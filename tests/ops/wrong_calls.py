"""Calls every C++ operator with arguments that are wrong in one or two ways.

    python -m tests.ops.wrong_calls REPORT

In a process of its own: what crashes ends it, and the last line of REPORT names the call. Every line
is ``{"call": ..., "ended": "raised" | "returned", ...}``; a call that is right ends the list of each
operator, so that what only raises is seen too.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastokd.ops import conv, cpp, max_pool  # noqa: F401  # define their operators

OPS = torch.ops.fastokd
# Students, samples, classes, peers and their width, pixels a side; channels of a map, of another, of
# a norm, of a convolution.
S, B, C, P, D, H = 3, 4, 10, 2, 6, 5
M, N, K, WIDE = 4, 6, 8, 16


def _maps(channels: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    x_BCHW = torch.randn(B, M if channels is None else channels, H, H, dtype=dtype)
    return x_BCHW.to(memory_format=torch.channels_last)


def _mixture() -> tuple[Any, ...]:
    return (
        *(torch.randn(S, B, C), torch.randn(1, B, C), torch.randint(max(C, 1), (B,))),
        *(torch.zeros(B, S, S + 1), None, torch.ones(S), torch.ones(S), torch.ones(S)),
        *(torch.tensor(3.0), 1.0, 1.0, 0.0, 3.0, "logits", False, 0.0, True, True, True, False),
        *(torch.randint(max(C, 1), (B,)), torch.rand(B), torch.ones(B)),
    )


def _peers() -> tuple[Any, ...]:
    return (
        *(torch.randn(S, B, C), None, torch.randint(max(C, 1), (B,))),
        *(torch.randn(B, P, D), torch.randn(B, P, D), torch.ones(S), torch.ones(S), None),
        *(torch.tensor(3.0), 1.0, 1.0, 0.0, 3.0, "logits", False, 0.0, True, False, True, True),
    )


def _norm() -> tuple[Any, ...]:
    return (
        *(_maps(K), torch.ones(K), torch.zeros(K), torch.zeros(K), torch.ones(K)),
        *(torch.tensor(0), _maps(K), True, 0.1, 1e-5),
    )


def _wide() -> Tensor:
    return _maps(WIDE, torch.bfloat16)


# A right call of each.
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mixture_distillation": _mixture,
    "peer_attention_distillation": _peers,
    "decoupled_distillation": lambda: (
        *(torch.randn(S, B, C), torch.randn(S, B, C), torch.randint(max(C, 1), (B,))),
        *(1.0, 8.0, 4.0, True),
    ),
    "correlation_distillation": lambda: (
        *(torch.randn(S, B, C), torch.randn(S, B, C), 1.0, 1.0, 4.0, True),
    ),
    "attention_map": lambda: (_maps(),),
    "attention_map_backward": lambda: (
        *(_maps(), torch.rand(B, H * H), torch.rand(B), torch.rand(B, H * H)),
    ),
    "attention_pair": lambda: (_maps(), _maps(N), False, True, True),
    "attention_pair_backward": lambda: (_maps(), torch.rand(B, H * H), torch.tensor(1.0)),
    "shifted_map": lambda: (_maps(),),
    "feature_pair": lambda: (_maps(), _maps()),
    "feature_pair_backward": lambda: (
        *(_maps(), _maps(), torch.rand(4, B), torch.tensor(1.0), True, True),
    ),
    "fused_bn_act": _norm,
    "fused_bn_act_backward": lambda: (
        *(_maps(K), _maps(K), _maps(K), torch.ones(K), torch.rand(4, K), True, True, True),
    ),
    "max_pool": lambda: (_wide(), 2),
    "max_pool_backward": lambda: (_wide(), _wide().byte(), 1, H, H),
    "conv2d": lambda: (_wide(), torch.randn(16, WIDE, 3, 3), 1, 1),
    "conv_transpose2d": lambda: (_wide(), torch.randn(WIDE, 16, 3, 3)),
    "conv_weight_grad": lambda: (_wide(), _wide(), 3, 1, 1),
}

# What is done to one tensor. The first group no operator may take as it is; of the second, some may.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a dimension more": lambda x: x[None],
    "two more": lambda x: x[None, None],
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "none": lambda x: None,
    "a number": lambda x: 5,
    "a list": lambda x: [x, x, x],
    "boolean": lambda x: x.bool(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float().contiguous(), 0.1, 0, torch.quint8),
}
ODD: dict[str, Callable[[Tensor], Any]] = {
    "flat": lambda x: x.reshape(-1),
    "one number": lambda x: x.reshape(-1)[:1].reshape(()),
    "nothing": lambda x: x.reshape(-1)[:0],
    "no samples": lambda x: x[:0],
    "cut": lambda x: x[1:],
    "cut behind": lambda x: x[..., :-1],
    "doubled": lambda x: torch.cat([x, x], -1),
    "doubled in front": lambda x: torch.cat([x, x]),
    "turned": lambda x: x.movedim(0, -1),
    "every second": lambda x: torch.cat([x, x])[::2],
    "every second behind": lambda x: torch.cat([x, x], -1)[..., ::2],
    "repeated by stride 0": lambda x: x[:1].expand(x.shape),
    "one number by stride 0": lambda x: x.reshape(-1)[0].expand(x.shape),
    "overlapping": lambda x: torch.as_strided(x.contiguous(), x.shape, [1] * x.dim()),
    "rows first": lambda x: x.contiguous().clone(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.to(torch.uint8),
    "meta": lambda x: x.to("meta"),
    "fake sizes": lambda x: torch.empty(0).expand(*x.shape[:-1], 0) if x.dim() else x[None][:0],
    "empty sizes": lambda x: x.new_empty([0] * x.dim()),
    "not numbers": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x - 99,
    "huge": lambda x: x * 1e38 if x.is_floating_point() else x + 2**40,
    "asks for a gradient": lambda x: x.detach().clone().requires_grad_(),
    "of inference": lambda x: _inference(x),
    "negated": lambda x: torch._neg_view(x),
}
NUMBERS: dict[type, list[Any]] = {
    bool: [None, "yes"],
    int: [0, -1, 2, 7, 2**40, 2**62, -(2**62), None, 1.5],
    float: [float("nan"), float("inf"), -1.0, 0.0, None],
    str: ["", "both", None],
}


@torch.inference_mode()
def _inference(x: Tensor) -> Tensor:
    return x.clone()


def _changed(arguments: tuple[Any, ...], place: int, change: Any) -> tuple[Any, ...]:
    made = list(arguments)
    made[place] = change(made[place])
    return tuple(made)


def _changes(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {**WRONG, **ODD}
    return {f"is {number!r}": lambda _, n=number: n for number in NUMBERS.get(type(value), [])}


def calls(op: str, pairs: int, draw: random.Random) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every argument wrong in every way, then ``pairs`` times two at once, then the right call."""
    arguments = CALLS[op]()
    single = [
        (place, name, change)
        for place, value in enumerate(arguments)
        for name, change in _changes(value).items()
    ]
    both = [draw.sample(single, 2) for _ in range(pairs)]
    for changes in itertools.chain(([one] for one in single), both):
        label = "; ".join(f"{place} {name}" for place, name, _ in changes)

        def call(changes: Any = changes) -> Any:
            made = CALLS[op]()
            for place, _, change in changes:
                made = _changed(made, place, change)
            return getattr(OPS, op)(*made)

        yield label, call
    yield "right", lambda: getattr(OPS, op)(*CALLS[op]())


def used(result: Any) -> str:
    """Reads all of a result, and takes its gradient where it has one; the device it is on."""
    values = tree_leaves(result)
    for value in values:
        if value.device.type == "cpu":
            value.detach().double().sum().item()
            if value.requires_grad and value.is_floating_point():
                value.sum().backward()
    return str(values[0].device)


def main() -> None:
    pairs = int(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    reason = cpp.ensure_built()
    assert reason is None, reason
    draw = random.Random(0)
    with open(sys.argv[1], "w") as report:
        for op in CALLS:
            for label, call in calls(op, pairs, draw):
                # First who is about to be called: it may be the last thing that is said.
                report.write(json.dumps({"call": f"{op}: {label}"})[:-1])
                report.flush()
                try:
                    ended = {"ended": "returned", "device": used(call())}
                except Exception as error:
                    ended = {"ended": "raised", "said": f"{type(error).__name__}: {error}"[:200]}
                report.write(f", {json.dumps(ended)[1:]}\n")


if __name__ == "__main__":
    main()
