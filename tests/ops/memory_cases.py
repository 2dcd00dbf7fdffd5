"""Drawn calls of MCL's contrasts with a memory, and what each implementation makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.ops.memory_contrast import memory_contrast, noise_contrast, similarities

# S, B, K, D, N: a block and less, several, a ragged last one; the recipe's width, and widths that fill no
# vector; one sample; several stretches of rows.
SHAPES = [
    (2, 3, 70, 128, 50),
    (4, 2, 33, 20, 7),
    (1, 2, 9, 17, 9),
    (3, 1, 530, 6, 11),
    (5, 2, 4, 1, 3),
]
WEIGHTS = (0.1, 1.0, 0.3, 0.7)

Given = tuple[Tensor, Tensor, Tensor]


def draw(
    S: int, B: int, K: int, D: int, N: int, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """Embeddings, a memory in ``dtype``, and rows of it."""
    g = torch.Generator().manual_seed(S + B + K + D)
    x_SBD = F.normalize(torch.randn(S, B, D, generator=g), dim=-1)
    memory_SND = F.normalize(torch.randn(S, N, D, generator=g), dim=-1).to(dtype)
    index_BK = torch.randint(N, (B, K), generator=g)
    return x_SBD.to(device), memory_SND.to(device), index_BK.to(device)


def run(given: Given, impl: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Similarities, losses and gradients; ``dtype`` is that of the arithmetic."""
    x_SBD, memory_SND, index_BK = given
    x_SBD = x_SBD.to(dtype).requires_grad_()
    if dtype == torch.float64:
        memory_SND = memory_SND.double()
    A_SSBK = similarities(x_SBD, memory_SND, index_BK, 0.1, impl=impl)
    g = torch.Generator().manual_seed(1)
    incoming = torch.randn(A_SSBK.shape, generator=g).to(A_SSBK)
    terms = memory_contrast(x_SBD, memory_SND, index_BK, positives=2, impl=impl)
    noise = noise_contrast(x_SBD, memory_SND, index_BK, impl=impl)
    total = torch.stack([w * term for w, term in zip(WEIGHTS, terms, strict=True)]).sum()
    found = {"A": A_SSBK, **terms._asdict(), "nce": noise}
    for name, value, grad in (
        ("grad_A", A_SSBK, incoming),
        ("grad_terms", total, torch.full_like(total, 1.7)),
        ("grad_nce", noise, torch.ones_like(noise)),
    ):
        (found[name],) = torch.autograd.grad(value, x_SBD, grad)
    return {name: value.detach() for name, value in found.items()}


def assert_within_budget(given: Given, impl: str) -> None:
    """No result is further from float64 than torch's in float32, plus a few roundings of its terms."""
    exact, plain = run(given, "torch", torch.float64), run(given, "torch")
    ours = run(given, impl)
    for name, wanted in exact.items():
        assert ours[name].dtype == torch.float32
        assert ours[name].shape == wanted.shape
        budget = (plain[name] - wanted).abs().max() + 2e-6 * wanted.abs().max() + 2e-6
        error = (ours[name] - wanted).abs().max()
        assert error <= budget, f"{name}: {error:.3g} beyond the budget of {budget:.3g}"
