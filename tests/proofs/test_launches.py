"""Launches and bytes of OKDDip's whole loss head, eager as in reference/ and fused: counted.

``python -m tests.proofs.test_launches`` prints the figures of docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.ops.fused_loss import FusedLoss, unit_gradient
from fastokd.reference.common import ReferenceOutputs
from fastokd.reference.okddip import ReferenceTwoLevel
from tests.proofs.offline import compiling_for

B, C, S, WIDTH = 256, 1000, 4, 64
# Dispatched, but nothing is launched (the last is a look at a number that lies on the CPU).
FREE = (
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_local_scalar_dense",
)


class Count(TorchDispatchMode):
    """Operators that launch a kernel, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name.split("::")[1] not in FREE:
            given = {name: x for name, x in (kwargs or {}).items() if name != "out"}  # the result
            tensors = [x for x in tree_leaves((args, given, result)) if isinstance(x, Tensor)]
            self.launches += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


@dataclass(frozen=True)
class Head:
    launches: int
    bytes: int


def inputs() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    logits = [torch.randn(B, C, requires_grad=True) for _ in range(S)]
    query_BPd, key_BPd = (torch.randn(B, S - 1, WIDTH, requires_grad=True) for _ in range(2))
    return logits, torch.randint(C, (B,)), query_BPd, key_BPd


def eager() -> Head:
    logits, labels_B, query_BPd, key_BPd = inputs()

    class Reference(ReferenceTwoLevel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        peers = S - 1  # type: ignore[assignment]

        def attention(self, peer_features: list[Tensor]) -> Tensor:
            return torch.softmax(torch.bmm(query_BPd, key_BPd.transpose(1, 2)), dim=2)

    with Count() as count:
        out = ReferenceOutputs(logits, logits, None)
        total = Reference().losses(out, labels_B, 0.5).total
        torch.autograd.grad(total, [*logits, query_BPd, key_BPd])
    return Head(count.launches, count.bytes)


def fused(unit: bool, dtype: torch.dtype = torch.float32) -> Head:
    """The two kernels of the forward, their bytes by design, and what the backward dispatches.

    ``unit``: the incoming gradient is a step's own, else any other.
    """
    from fastokd.kernels.mixture_distillation import mixture_distillation

    logits, labels_B, query_BPd, key_BPd = inputs()
    logits_SBC = torch.stack(logits)
    leaves = tuple(x.detach().to(dtype).requires_grad_() for x in (logits_SBC, query_BPd, key_BPd))
    with compiling_for("sm_90") as kernels:
        z, query, key = (x.detach() for x in leaves)
        total, _, _, gradients = mixture_distillation(
            z, None, labels_B, query, key, None, None, None, None,
            1.0, 0.5, 0.0, 3.0, "logits", False, 0.0, True, False, True, True,
        )  # fmt: skip
    rows = 2 * leaves[0].nbytes  # logits in, gradients out
    # Queries and keys in, twice; their gradients out, in float32.
    scores = 2 * (2 * leaves[1].nbytes + 2 * query_BPd.nbytes)
    losses = 2 * 3 * S * B * 4  # out, and in again
    with Count() as count:
        # Counted as on a GPU: a gradient that isn't the step's own is never looked at.
        dtypes = [x.dtype for x in leaves]
        found = FusedLoss.apply((total, gradients, dtypes), *leaves)
        torch.autograd.grad(found, leaves, unit_gradient(found) if unit else None)
    there = labels_B.nbytes + count.bytes
    return Head(len(kernels) + count.launches, rows + scores + losses + there)


ROWS = {
    "eager": eager,
    "fused": partial(fused, True),
    "fused, bf16": partial(fused, True, torch.bfloat16),
    "fused, the total multiplied by a weight": partial(fused, False),
}


@pytest.mark.proof
def test_launches() -> None:
    before, *after = (head() for head in ROWS.values())
    # Loss, reduction and the incoming gradient of 1; in bf16 a cast of the gradients of queries and keys;
    # else a multiply each for logits, queries and keys.
    assert [head.launches for head in after] == [3, 4, 6]
    assert all(before.launches > 25 * head.launches for head in after)
    assert all(before.bytes > 12 * head.bytes for head in after)


if __name__ == "__main__":
    for name, head in ROWS.items():
        print(f"{name}: {head().launches} launches, {head().bytes / 1e6:.1f} MB")
    print(f"logits in, gradients out: {2 * S * B * C * 4 / 1e6:.1f} MB")
