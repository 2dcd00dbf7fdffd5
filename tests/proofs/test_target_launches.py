"""Launches and bytes of DKD and DIST, in plain torch and fused: counted.

``python -m tests.proofs.test_target_launches`` prints the figures of docs/kernels.md.
"""

from __future__ import annotations

import pytest
import torch

from fastokd.ops._targets import TargetLoss
from tests.ops.target_cases import Drawn, draw, losses
from tests.proofs.offline import compiling_for
from tests.proofs.test_launches import Count, Head

S, B, C = 4, 256, 1000
NUMBERS = {"decoupled": (1.0, 8.0, 4.0), "correlation": (1.0, 1.0, 4.0)}
ROWS = {
    f"{op}_distillation{', bf16' if dtype == torch.bfloat16 else ''}": (op, dtype)
    for op in NUMBERS
    for dtype in (torch.float32, torch.bfloat16)
}


def drawn(dtype: torch.dtype) -> Drawn:
    """Four students and one target."""
    found = draw(S, B, C, dtype=dtype)
    return found._replace(logits_SBC=found.logits_SBC.requires_grad_())


def eager(op: str, dtype: torch.dtype) -> Head:
    given = drawn(dtype)
    with Count() as count:
        loss_S = losses(op, given, "torch")
        torch.autograd.grad(loss_S, given.logits_SBC, loss_S.detach())
    return Head(count.launches, count.bytes)


def fused(op: str, dtype: torch.dtype) -> Head:
    """The kernels, whose bytes are by design, and what is dispatched beside them."""
    z_SBC, t_SBC, labels_B = drawn(dtype)
    given = (t_SBC, labels_B) if op == "decoupled" else (t_SBC,)
    with compiling_for("sm_90") as kernels, Count() as count:
        loss_S = TargetLoss.apply(f"{op}_distillation", "triton", z_SBC, *given, *NUMBERS[op])
        torch.autograd.grad(loss_S, z_SBC, loss_S.detach())
    designed = 4 * S * B * C  # the gradient, fp32
    if op == "decoupled":
        designed += z_SBC.nbytes + t_SBC.nbytes + labels_B.nbytes + 4 * S * B
    else:  # by each launch; 7 numbers of a sample and 6 of a class, written once
        designed += 3 * (z_SBC.nbytes + S * t_SBC.nbytes)
        designed += 4 * S * ((7 + 4 + 7) * B + (6 + 6) * C) + 4 * S
    return Head(len(kernels) + count.launches, designed + count.bytes)


@pytest.mark.proof
def test_launches() -> None:
    for name, (op, dtype) in ROWS.items():
        before, after = eager(op, dtype), fused(op, dtype)
        # DKD: its kernel and the sum over the batch. DIST: samples, classes, gradient. Then the product with
        # the incoming gradients.
        assert after.launches == (3 if op == "decoupled" else 4), name
        assert before.launches > 10 * after.launches, name
        assert before.bytes > 5 * after.bytes, name


if __name__ == "__main__":
    print("| | eager launches | eager MB | fused launches | fused MB |\n|---|---|---|---|---|")
    for name, row in ROWS.items():
        before, after = eager(*row), fused(*row)
        print(
            f"| {name} | {before.launches} | {before.bytes / 1e6:.1f} "
            f"| {after.launches} | {after.bytes / 1e6:.1f} |"
        )
    rows = (2 * S + 1) * B * C * 4
    print(f"logits and target in, gradient out, fp32: {rows / 1e6:.1f} MB")
