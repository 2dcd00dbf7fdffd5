"""Launches and bytes of norms with their residuals and ReLUs, as PyTorch's operators and fused: counted.

``python -m tests.proofs.test_norm_launches`` prints the tables of docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fastokd.models import create_model
from fastokd.models.layers import NormAct
from tests.proofs.offline import compiling_for
from tests.proofs.test_launches import FREE, Count, Head

# Kernels of PyTorch's channels-last BatchNorm on a GPU: partial statistics, their merge, the map; sums
# and gradient. Each reads the map twice.
NATIVE = {"native_batch_norm": 3, "native_batch_norm_backward": 2}


@dataclass(frozen=True)
class Norm:
    """A norm of a network: its map's shape, and whether it adds a residual and has a ReLU."""

    shape: tuple[int, ...]
    residual: bool
    relu: bool


class Passes(Count):
    """Counts launches as on a GPU, and ``passes``: how often a map is read or written."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.passes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE:
            self.launches += NATIVE.get(name, 1) - 1
            outs = out if isinstance(out, tuple) else (out,)
            read, written = (
                sum(isinstance(x, Tensor) and x.numel() == self.size for x in tensors)
                for tensors in (args, outs)
            )
            self.passes += read * (2 if name in NATIVE else 1) + written
        return out


def eager(norm: Norm) -> tuple[int, int]:
    """Launches and passes over the map of ``nn.BatchNorm2d``, ``+`` and ``relu``, forward and backward."""
    layer = NormAct(norm.shape[1], relu=norm.relu)
    x_BCHW = torch.randn(norm.shape).to(memory_format=torch.channels_last).requires_grad_()
    add_BCHW = x_BCHW.detach().clone().requires_grad_() if norm.residual else None
    leaves = [x for x in (x_BCHW, *layer.parameters(), add_BCHW) if x is not None]
    grad_BCHW = torch.ones_like(x_BCHW)
    with Passes(x_BCHW.numel()) as count:
        torch.autograd.grad(layer(x_BCHW, add_BCHW), leaves, grad_BCHW)
    return count.launches, count.passes


def fused(norm: Norm) -> tuple[int, float]:
    """The same of the Triton form: counted launches, and passes by design. A bit a value is 1/16 of a
    bf16 map."""
    from fastokd.kernels import fused_bn_act as kernel

    x_BCHW = torch.zeros(norm.shape).to(memory_format=torch.channels_last)
    add_BCHW = x_BCHW if norm.residual else None
    state: tuple[Tensor, ...] = (torch.zeros(norm.shape[1]),) * 4
    masked = norm.relu and norm.residual
    batches = torch.zeros((), dtype=torch.long)
    with compiling_for("sm_90") as kernels, Count() as count:
        y_BCHW, stats, bits = kernel.fused_bn_act(
            x_BCHW, *state, batches, add_BCHW, norm.relu, 0.1, 1e-5
        )
        kernel.fused_bn_act_backward(
            y_BCHW, x_BCHW, bits if masked else None, state[0], stats, norm.relu, True, masked
        )
    # x, x, y; dy, x; g or dy, x, dx; the residual, and where it is masked g and the bits twice.
    passes = 8 + norm.residual + masked * (1 + 2 / 16)
    return len(kernels) + count.launches, passes


def norms_of(model: str, classes: int, size: int, B: int) -> list[Norm]:
    """Every norm of one student."""
    found: list[Norm] = []
    with torch.device("meta"):
        student = create_model(model, classes)

        def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            residual = len(args) > 1 and args[1] is not None
            found.append(Norm(tuple(args[0].shape), residual, bool(layer.relu)))

        for layer in student.modules():
            if isinstance(layer, NormAct):
                layer.register_forward_pre_hook(see)
        student(torch.empty(B, 3, size, size))
    return found


NETWORKS = {
    "ResNet-32, S 4, B 128": ("resnet32", 100, 32, 4, 128),
    "ResNet-18, 224x224, S 4, B 256": ("resnet18", 1000, 224, 4, 256),
    "ResNet-34, 224x224, S 4, B 256": ("resnet34", 1000, 224, 4, 256),
}
FORMS = {
    "BN": Norm((8, 16, 4, 4), False, False),
    "BN + ReLU": Norm((8, 16, 4, 4), False, True),
    "BN + residual + ReLU": Norm((8, 16, 4, 4), True, True),
}


def network(name: str) -> tuple[int, Head, Head]:
    """Norms of all students, and their launches and bytes in bf16: eager, fused."""
    model, classes, size, S, B = NETWORKS[name]
    norms = norms_of(model, classes, size, B)
    costs = {(form.residual, form.relu): (eager(form), fused(form)) for form in FORMS.values()}
    heads = []
    for form in range(2):
        launches, moved = 0, 0.0
        for norm in norms:
            count, passes = costs[norm.residual, norm.relu][form]
            launches += S * count
            moved += S * passes * torch.Size(norm.shape).numel() * 2
        heads.append(Head(launches, int(moved)))
    return S * len(norms), heads[0], heads[1]


@pytest.mark.proof
def test_launches_and_passes() -> None:
    # BatchNorm's three launches, its counter, the addition, ReLU; ReLU's backward, BatchNorm's two.
    assert [eager(form) for form in FORMS.values()] == [(6, 8), (8, 13), (9, 16)]
    assert [fused(form) for form in FORMS.values()] == [(4, 8), (4, 8), (4, 10.125)]


@pytest.mark.proof
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    norms, before, after = network(name)
    assert after.launches == 4 * norms
    assert before.launches > 1.9 * after.launches
    assert before.bytes > 1.5 * after.bytes


if __name__ == "__main__":
    print("| | launches: eager, fused | passes over the map: eager, fused |")
    print("|---|---|---|")
    for label, form in FORMS.items():
        (launches, passes), (ours, our_passes) = eager(form), fused(form)
        print(f"| {label} | {launches}, {ours} | {passes}, {our_passes:.1f} |")
    print("\n| network | norms | launches: eager, fused | GB: eager, fused |")
    print("|---|---|---|---|")
    for label in NETWORKS:
        count, before, after = network(label)
        print(
            f"| {label} | {count} | {before.launches}, {after.launches} "
            f"| {before.bytes / 1e9:.2f}, {after.bytes / 1e9:.2f} |"
        )
