"""The Triton kernel's query/key form against float64: what it adds to mixture_distillation's."""

from __future__ import annotations

import pytest
import torch
from fastokd.kernels import mixture_distillation as kernel
from torch import Tensor

from fastokd.ops.peer_attention_distillation import peer_attention_distillation
from tests.ops.mixture_cases import assert_errors_within_budget
from tests.ops.poison import poisoned

pytestmark = pytest.mark.gpu


def found(
    impl: str,
    dtype: torch.dtype,
    logits: Tensor,
    labels: Tensor,
    q: Tensor,
    k: Tensor,
    **options: object,
) -> dict[str, Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (logits, q, k)]
    loss = peer_attention_distillation(
        leaves[0],
        labels,
        *leaves[1:],
        kd_weight=0.7,
        impl=impl,
        **options,  # type: ignore[arg-type]
    )
    gradients = torch.autograd.grad(loss.total, leaves, loss.total.new_tensor(0.37))
    names = ("total", "ce_S", "kd_S", "grad_logits", "grad_query", "grad_key")
    return dict(zip(names, (*loss, *gradients), strict=True))


# With a leader and without; widths of CIFAR's and of ImageNet's students, ragged too.
@pytest.mark.parametrize(
    ("S", "P", "width"), [(4, 3, 8), (3, 3, 20), (2, 1, 64), (5, 4, 100), (16, 15, 40)]
)
def test_gradients(S: int, P: int, width: int, poisoned_device: torch.device) -> None:
    check(S, P, width, poisoned_device)


# CIFAR-100's and ImageNet's batches; few images under the interpreter, which takes one at a time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "C", "width"), [(128, 100, 8), (256, 1000, 64)])
def test_training_shapes(
    B: int, C: int, width: int, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    B = 2 if poisoned_device.type == "cpu" else B
    check(4, 3, width, poisoned_device, C, B, dtype)


@pytest.mark.parametrize("mix", ["probs", "pairwise"])
def test_mixes(mix: str, poisoned_device: torch.device) -> None:
    check(4, 3, 8, poisoned_device, mix=mix, label_smoothing=0.1)


def test_mixed_labels_and_weights_of_samples(poisoned_device: torch.device) -> None:
    labels2_B = torch.tensor([1, 7], device=poisoned_device)
    share2_B = torch.tensor([0.3, 1.0], device=poisoned_device)
    options = {"mixed_with": (labels2_B, share2_B), "sample_weight_B": share2_B + 0.5}
    check(4, 3, 8, poisoned_device, label_smoothing=0.1, **options)


def test_sweeps(monkeypatch: pytest.MonkeyPatch, poisoned_device: torch.device) -> None:
    monkeypatch.setattr(kernel, "block_and_warps", lambda *_: (32, 1))
    check(4, 3, 8, poisoned_device, C=70)


def drawn(
    S: int,
    P: int,
    width: int,
    device: torch.device,
    C: int = 10,
    B: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, queries and keys."""
    g = torch.Generator().manual_seed(S * 100 + width)
    logits = 2 * torch.randn(S, B, C, generator=g)
    labels = torch.randint(C, (B,), generator=g)
    # Not contiguous: the peers' projections lie side by side.
    both = torch.randn(2, P, B, width, generator=g).mul(width**-0.25).to(device, dtype)
    q, k = both.transpose(1, 2)
    return logits.to(device, dtype), labels.to(device), q, k


def check(
    S: int,
    P: int,
    width: int,
    device: torch.device,
    C: int = 10,
    B: int = 2,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> None:
    inputs = drawn(S, P, width, device, C, B, dtype)
    ours = found("triton", dtype, *inputs, **options)
    with poisoned(False):
        theirs = found("torch", dtype, *inputs, **options)
        exact = found("torch", torch.float64, *inputs, **options)
    assert_errors_within_budget(ours, theirs, exact, B, C, "triton")


def test_query_and_key_one_at_a_time(poisoned_device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 10, generator=g).to(poisoned_device)
    labels = torch.tensor([4], device=poisoned_device)
    q, k = torch.randn(2, 1, 2, 8, generator=g).to(poisoned_device)
    both = found("triton", torch.float32, logits, labels, q, k)
    for place, name in enumerate(("grad_query", "grad_key")):
        leaves = [q.clone(), k.clone()]
        leaves[place].requires_grad_()
        loss = peer_attention_distillation(logits, labels, *leaves, kd_weight=0.7, impl="triton")
        (gradient,) = torch.autograd.grad(loss.total, [leaves[place]], loss.total.new_tensor(0.37))
        torch.testing.assert_close(gradient, both[name])


def test_empty_batch(poisoned_device: torch.device) -> None:
    empty = torch.zeros(0, 2, 8, device=poisoned_device)
    labels = torch.zeros(0, dtype=torch.long, device=poisoned_device)
    logits = torch.zeros(3, 0, 10, device=poisoned_device)
    result = found("triton", torch.float32, logits, labels, empty, empty)
    assert result["total"] == 0
    assert result["grad_query"].shape == (0, 2, 8)
