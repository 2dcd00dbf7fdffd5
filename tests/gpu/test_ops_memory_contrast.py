"""The Triton form of MCL's contrasts with a memory against float64, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastokd.errors import UserError
from fastokd.ops.memory_contrast import memory_contrast, similarities
from tests.ops.memory_cases import SHAPES, assert_within_budget, draw, run
from tests.ops.poison import poisoned

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_no_further_from_float64_than_pytorch(
    shape: tuple[int, ...], poisoned_device: torch.device
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes if shape == SHAPES[1] else dtypes[:1]:
        given = draw(*shape, device=poisoned_device, dtype=dtype)
        assert_within_budget(given, "triton")


def test_at_the_recipes_size(poisoned_device: torch.device) -> None:
    """Several blocks and stretches; little of it under the interpreter."""
    B, K, N = (1, 300, 500) if poisoned_device.type == "cpu" else (64, 8194, 100_000)
    assert_within_budget(draw(2, B, K, 128, N, device=poisoned_device), "triton")


def test_rows_outside_the_memory_are_nan_and_not_read(poisoned_device: torch.device) -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12, device=poisoned_device)
    clean = run((x_SBD, memory_SND, index_BK), "triton")
    index_BK[1, 4], index_BK[1, 19], index_BK[2, 0] = -1, 12, 2**40
    found = run((x_SBD, memory_SND, index_BK), "triton")
    with poisoned(False):
        outside_BK = (index_BK < 0) | (index_BK >= 12)
        assert torch.equal(found["A"].isnan(), outside_BK.expand_as(found["A"]))
        inside = found["A"].nan_to_num(0), clean["A"].masked_fill(outside_BK, 0)
        torch.testing.assert_close(*inside)
        assert torch.equal(found["grad_A"][:, 0], clean["grad_A"][:, 0])
        assert found["grad_A"][:, 1:].isnan().all()


def test_a_memory_of_more_than_2_to_the_31_numbers(
    triton_device: torch.device, tmp_path: Path
) -> None:
    S, N, D = 2, 9_000_000, 128
    if triton_device.type == "cpu":  # pages of a file that nobody writes don't exist
        with open(tmp_path / "memory", "wb") as file:
            file.truncate(2 * S * N * D)
        memory = torch.from_file(
            str(tmp_path / "memory"), shared=True, size=S * N * D, dtype=torch.bfloat16
        )
    else:
        memory = torch.zeros(S * N * D, dtype=torch.bfloat16, device=triton_device)
    memory_SND = memory.view(S, N, D)
    index_BK = torch.tensor([[0, N - 1, 5_000_000], [N - 2, 7, 8_500_000]], device=triton_device)
    memory_SND[:, index_BK.flatten()] = torch.randn(S, 6, D, device=triton_device).bfloat16()
    x_SBD = torch.randn(S, 2, D, device=triton_device, requires_grad=True)
    found, wanted = (
        similarities(x_SBD, memory_SND, index_BK, 1.0, impl=impl) for impl in ("triton", "torch")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(A.sin().sum(), x_SBD)[0] for A in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("B", "K"), [(0, 9), (3, 0)])
def test_nothing_to_read(B: int, K: int, poisoned_device: torch.device) -> None:
    x_SBD, memory_SND, index_BK = draw(2, B, K, 16, 5, device=poisoned_device)
    A_SSBK = similarities(x_SBD.requires_grad_(), memory_SND, index_BK, 0.1, impl="triton")
    (dx_SBD,) = torch.autograd.grad(A_SSBK.sum(), x_SBD)
    assert A_SSBK.shape == (2, 2, B, K)
    assert dx_SBD.shape == (2, B, 16)
    assert not dx_SBD.any()


def test_what_it_leaves_to_torch(triton_device: torch.device) -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12, device=triton_device)
    for given, says in (
        ((x_SBD.double(), memory_SND, index_BK), "float64 is for impl='torch'"),
        ((x_SBD, memory_SND.mT.contiguous().mT, index_BK), "the memory is not contiguous"),
        (draw(9, 2, 5, 3, 4, device=triton_device), "at most 8 students and embeddings of 1024"),
        (draw(1, 1, 5, 1025, 4, device=triton_device), "at most 8 students and embeddings of 1024"),
    ):
        with pytest.raises(UserError, match=says):
            memory_contrast(*given, impl="triton")
        assert all(term.isfinite() for term in memory_contrast(*given))
