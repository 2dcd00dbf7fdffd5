"""The Triton kernel's query/key form against float64: what it adds to mixture_distillation's."""

from __future__ import annotations

import pytest
import torch
from fastokd.kernels import mixture_distillation as kernel
from torch import Tensor

from fastokd.ops.peer_attention_distillation import peer_attention_distillation


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
    names = ("total", "ce_S", "kd_S", "logits", "query", "key")
    return dict(zip(names, (*loss, *gradients), strict=True))


# With a leader and without; widths of CIFAR's and of ImageNet's students, ragged too.
@pytest.mark.parametrize(
    ("S", "P", "width"), [(4, 3, 8), (3, 3, 20), (2, 1, 64), (5, 4, 100), (16, 15, 40)]
)
def test_gradients(S: int, P: int, width: int) -> None:
    check(S, P, width)


@pytest.mark.parametrize("mix", ["probs", "pairwise"])
def test_mixes(mix: str) -> None:
    check(4, 3, 8, mix=mix, label_smoothing=0.1)


def test_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "plan", lambda *_: (32, 1))
    check(4, 3, 8, C=70)


def check(S: int, P: int, width: int, C: int = 10, B: int = 2, **options: object) -> None:
    g = torch.Generator().manual_seed(S * 100 + width)
    logits = 2 * torch.randn(S, B, C, generator=g)
    labels = torch.randint(C, (B,), generator=g)
    # Not contiguous: the peers' projections lie side by side.
    q, k = torch.randn(2, P, B, width, generator=g).mul(width**-0.25).transpose(1, 2)
    inputs = (logits, labels, q, k)
    ours = found("triton", torch.float32, *inputs, **options)
    theirs = found("torch", torch.float32, *inputs, **options)
    exact = found("torch", torch.float64, *inputs, **options)
    eps = torch.finfo(torch.float32).eps
    for name, x in exact.items():
        error, budget = (ours[name] - x).abs(), (theirs[name] - x).abs()
        assert (error <= budget + 16 * eps * (x.abs().max() + 1)).all(), name
        if name in ("logits", "query", "key"):
            limit = 1.5 * budget.square().mean().sqrt() + 4 * eps * x.square().mean().sqrt()
            assert error.square().mean().sqrt() <= limit, name


def test_query_and_key_one_at_a_time() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 1, 10, generator=g), torch.tensor([4])
    q, k = torch.randn(2, 1, 2, 8, generator=g)
    both = found("triton", torch.float32, logits, labels, q, k)
    for place, name in enumerate(("query", "key")):
        leaves = [q.clone(), k.clone()]
        leaves[place].requires_grad_()
        loss = peer_attention_distillation(logits, labels, *leaves, kd_weight=0.7, impl="triton")
        (gradient,) = torch.autograd.grad(loss.total, [leaves[place]], loss.total.new_tensor(0.37))
        torch.testing.assert_close(gradient, both[name])


def test_empty_batch() -> None:
    empty = torch.zeros(0, 2, 8)
    labels = torch.zeros(0, dtype=torch.long)
    result = found("triton", torch.float32, torch.zeros(3, 0, 10), labels, empty, empty)
    assert result["total"] == 0
    assert result["query"].shape == (0, 2, 8)
