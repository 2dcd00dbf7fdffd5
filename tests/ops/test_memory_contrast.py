"""MCL's contrasts with a memory in C++: the reference's values and gradients, and what is never written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.errors import UserError
from fastokd.ops.memory_contrast import gathered_similarities, memory_contrast, similarities
from tests.ops.memory_cases import SHAPES, assert_within_budget, draw, run

OPS = torch.ops.fastokd
pytestmark = pytest.mark.usefixtures("cpp_ops")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_no_further_from_float64_than_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_within_budget(draw(*shape, dtype=dtype), "cpp")


@pytest.mark.usefixtures("capability")
def test_every_instruction_set() -> None:
    for dtype in (torch.float32, torch.float16):
        assert_within_budget(draw(6, 2, 11, 37, 9, dtype=dtype), "cpp")


def test_embeddings_of_any_layout_and_half_precision() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 4, 30, 16, 20)
    turned = x_SBD.transpose(0, 2).contiguous().transpose(0, 2)
    spread = torch.stack([index_BK, index_BK], -1)[..., 0]
    torch.testing.assert_close(
        run((turned, memory_SND, spread), "cpp"), run((x_SBD, memory_SND, index_BK), "cpp")
    )
    half = x_SBD.bfloat16().requires_grad_()
    found = memory_contrast(half, memory_SND, index_BK, impl="cpp")
    wanted = memory_contrast(half, memory_SND, index_BK, impl="torch")
    torch.testing.assert_close(found, wanted)
    for term, other in zip(found, wanted, strict=True):
        ours, theirs = (torch.autograd.grad(t, half, retain_graph=True)[0] for t in (term, other))
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs)


def test_non_finite_numbers_go_where_the_references_go() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)
    memory_SND[1, 3, 2], memory_SND[0, 4, 5], x_SBD[0, 1, 7] = torch.nan, torch.inf, -torch.inf
    found, wanted = (
        similarities(x_SBD, memory_SND, index_BK, 0.1, impl=impl) for impl in ("cpp", "torch")
    )
    torch.testing.assert_close(found, wanted, equal_nan=True)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.elements = max([self.elements, *sizes])
        return result


def test_the_gathered_rows_are_never_written() -> None:
    S, B, K, D, N = 2, 8, 64, 32, 10
    given, found = draw(S, B, K, D, N), {}
    for impl in ("torch", "cpp"):
        with Largest() as largest:
            run(given, impl)
        found[impl] = largest.elements
    assert found == {"torch": B * K * D, "cpp": S * S * B * K}


def test_a_memory_of_more_than_2_to_the_31_numbers(tmp_path: Path) -> None:
    """Pages of a file of 4.6 GB that nobody writes don't exist."""
    S, N, D = 2, 9_000_000, 128
    with open(tmp_path / "memory", "wb") as file:
        file.truncate(2 * S * N * D)
    memory = torch.from_file(
        str(tmp_path / "memory"), shared=True, size=S * N * D, dtype=torch.bfloat16
    )
    memory_SND = memory.view(S, N, D)
    index_BK = torch.tensor([[0, N - 1, 5_000_000], [N - 2, 7, 8_500_000]])
    memory_SND[:, index_BK.flatten()] = torch.randn(S, 6, D).bfloat16()
    x_SBD = torch.randn(S, 2, D, requires_grad=True)
    found = similarities(x_SBD, memory_SND, index_BK, 1.0, impl="cpp")
    wanted = gathered_similarities(x_SBD, memory_SND, index_BK, 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(A.sin().sum(), x_SBD)[0] for A in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_a_memory_that_has_changed_is_not_read_again() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)
    A_SSBK = similarities(x_SBD.requires_grad_(), memory_SND, index_BK, 0.1, impl="cpp")
    memory_SND.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        A_SSBK.sum().backward()


@pytest.mark.parametrize("row", [-1, 12, 2**40])
def test_a_row_outside_the_memory_raises(row: int) -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)
    grad_SSBK = torch.zeros(2, 2, 3, 20)
    index_BK[2, 19] = row
    for impl in ("cpp", "torch"):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            similarities(x_SBD, memory_SND, index_BK, 0.1, impl=impl)
    with pytest.raises(IndexError, match=f"index_BK has {row}, but the memory has 12 rows"):
        OPS.memory_similarities_backward(grad_SSBK, memory_SND, index_BK, 1.0)


def test_an_empty_batch_has_losses_of_0() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 0, 20, 16, 12)
    for term in memory_contrast(x_SBD.requires_grad_(), memory_SND, index_BK):
        assert term == 0
        assert torch.autograd.grad(term, x_SBD, retain_graph=True)[0].shape == (2, 0, 16)


def test_it_compiles_in_one_graph() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)

    def vcl(x_SBD: Tensor) -> Tensor:
        return memory_contrast(x_SBD, memory_SND, index_BK).vcl

    found, wanted = (
        torch.autograd.grad(f(x_SBD.requires_grad_()), x_SBD)[0]
        for f in (torch.compile(vcl, backend="aot_eager", fullgraph=True), vcl)
    )
    torch.testing.assert_close(found, wanted)


def test_opcheck() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)
    torch.library.opcheck(OPS.memory_similarities.default, (x_SBD, memory_SND, index_BK, 2.0))
    grad_SSBK = torch.randn(2, 2, 3, 20)
    torch.library.opcheck(
        OPS.memory_similarities_backward.default, (grad_SSBK, memory_SND, index_BK, 2.0)
    )


def test_what_is_refused() -> None:
    x_SBD, memory_SND, index_BK = draw(2, 3, 20, 16, 12)
    for given, says in (
        ((x_SBD, memory_SND[:1], index_BK), r"they must be \[students, batch, width\]"),
        ((x_SBD, memory_SND, index_BK[:2]), r"and \[2, 20\]: they must be"),
        ((x_SBD, memory_SND, index_BK[0]), r"and \[20\]: they must be"),
        ((x_SBD[:0], memory_SND[:0], index_BK), "of a student and a number at least"),
        ((x_SBD, memory_SND, index_BK.int()), "index_BK is torch.int32: they must be floating"),
        ((x_SBD.long(), memory_SND, index_BK), "embeddings_SBD is torch.int64"),
        ((x_SBD, memory_SND, index_BK.to("meta")), "index_BK is on meta: move all to one device"),
    ):
        for impl in ("cpp", "torch", "auto"):
            with pytest.raises(UserError, match=says):
                memory_contrast(*given, impl=impl)
    for given, says in (
        ((x_SBD.double(), memory_SND, index_BK), "float64 is for impl='torch'"),
        ((x_SBD, memory_SND.mT.contiguous().mT, index_BK), "the memory is not contiguous"),
    ):
        with pytest.raises(UserError, match=says):
            memory_contrast(*given, impl="cpp")
        memory_contrast(*given)
    with pytest.raises(UserError, match="positives is 19, but a sample has 20 rows"):
        memory_contrast(x_SBD, memory_SND, index_BK, positives=19)
