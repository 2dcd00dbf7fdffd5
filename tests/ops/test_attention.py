"""FFSD's map losses: the published code's numbers, the definitions' edges, the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastokd import ops
from fastokd.errors import UserError
from tests.conftest import golden
from tests.ops.map_cases import LOSSES, OPS, draw
from tests.ops.map_edges import Edges


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_meet_the_published_code(name: str) -> None:
    g = golden("ffsd_attention")
    x = g["student_map_BCHW"].requires_grad_()
    loss = LOSSES[name](x, g["other_map_BCHW"], impl="torch")
    (grad,) = torch.autograd.grad(loss, x)
    close(loss, g[f"{name}_loss"])
    close(grad, g[f"grad_{name}_loss"])


def test_a_shifted_map_in_bf16_is_rounded_once() -> None:
    other_BCHW = torch.randn(3, 5, 6, 7).bfloat16()
    exact_BCHW = ops.shifted_map(other_BCHW.float(), impl="torch")
    assert torch.equal(ops.shifted_map(other_BCHW, impl="torch"), exact_BCHW.bfloat16())


def test_shifted_map_meets_the_published_code() -> None:
    g = golden("ffsd_attention")
    close(ops.shifted_map(g["other_map_BCHW"], impl="torch"), g["shifted_map_BCHW"])


class TestGradients:
    @pytest.mark.parametrize("name", ["attention", "feature"])
    def test_transfers_are_differentiable_in_both(self, name: str) -> None:
        x, y = (t.requires_grad_() for t in draw())
        assert torch.autograd.gradcheck(lambda a, b: LOSSES[name](a, b, impl="torch"), (x, y))

    def test_diversity_is_differentiable_in_the_student_alone(self) -> None:
        x, y = (t.requires_grad_() for t in draw())
        assert torch.autograd.gradcheck(
            lambda a: ops.attention_diversity(a, y.detach(), impl="torch"), (x,)
        )
        loss = ops.attention_diversity(x, y, impl="torch")
        assert torch.autograd.grad(loss, [x, y], allow_unused=True)[1] is None

    def test_map(self) -> None:
        x = draw()[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda a: ops.attention_map(a, impl="torch"), (x,))

    def test_shifted_map_has_none(self) -> None:
        x = draw()[0].requires_grad_()
        assert not ops.shifted_map(x, impl="torch").requires_grad


class TestEdges(Edges):
    impl = "torch"


def test_attention_compares_maps_of_different_widths() -> None:
    x, y = draw(C=4)[0], draw(C=7)[0]
    assert ops.attention_transfer(x, y, impl="torch") > 0
    assert ops.attention_diversity(x, y, impl="torch") > 0


@pytest.mark.parametrize("name", LOSSES)
def test_float64_where_one_map_is(name: str) -> None:
    x, y = draw(dtype=torch.float32)
    assert LOSSES[name](x, y.double(), impl="torch").dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_layout_changes_nothing(name: str) -> None:
    x, y = draw()
    expected = LOSSES[name](x, y, impl="torch")
    for other in (
        y.contiguous(memory_format=torch.channels_last),
        y.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([y, y], dim=-1)[..., 0],
    ):
        close(LOSSES[name](x, other, impl="torch"), expected)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("attention", {"student_BCHW": torch.zeros(2, 3, 1, 2)}, "1 x 2 pixels"),
        ("diversity", {"student_BCHW": torch.zeros(2, 3, 2, 1)}, "2 x 1 pixels"),
        ("map", {"maps_BCHW": torch.zeros(2, 3, 1, 1)}, "at least 3"),
        ("shifted", {"other_BCHW": torch.zeros(2, 3, 1, 2)}, "at least 3"),
        ("map", {"maps_BCHW": torch.zeros(2, 3, 9)}, r"of shape \[2, 3, 9\]"),
        ("map", {"maps_BCHW": torch.zeros(2, 3, 3, 3, dtype=torch.long)}, "torch.int64"),
        ("map", {"maps_BCHW": torch.zeros(2, 0, 3, 3)}, "maps_BCHW is"),
        ("attention", {"other_BCHW": torch.zeros(3, 4, 5, 3)}, r"\[3, channels, 3, 5\]"),
        ("feature", {"other_BCHW": torch.zeros(3, 5, 3, 5)}, r"\[3, 4, 3, 5\]"),
        ("diversity", {"other_BCHW": torch.zeros(2, 4, 3, 5)}, "other_BCHW is"),
        ("attention", {"other_BCHW": torch.zeros(3, 4, 3, 5, device="meta")}, "is on meta"),
        ("attention", {"impl": "cuda"}, "impl is 'cuda'"),
        ("shifted", {"impl": "triton"}, "needs a GPU"),
    ],
)
def test_bad_input_is_named(name: str, change: dict[str, object], says: str) -> None:
    x, y = draw()
    arguments: dict[str, object] = {
        "map": {"maps_BCHW": x},
        "shifted": {"other_BCHW": y},
    }.get(name, {"student_BCHW": x, "other_BCHW": y})  # type: ignore[assignment]
    with pytest.raises(UserError, match=says):
        OPS[name](**{**arguments, **change})  # type: ignore[operator]
