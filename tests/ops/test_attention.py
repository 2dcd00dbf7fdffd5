"""FFSD's map losses: the published code's numbers, the definitions' edges, the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastokd import ops
from fastokd.errors import UserError
from tests.conftest import golden

LOSSES = {
    "attention": ops.attention_transfer,
    "feature": ops.feature_transfer,
    "diversity": ops.attention_diversity,
}
OPS = {**LOSSES, "map": ops.attention_map, "shifted": ops.shifted_map}


def draw(
    B: int = 3, C: int = 4, H: int = 3, W: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + C * 100 + H * 10 + W)
    x, y = torch.randn(2, B, C, H, W, generator=g, dtype=torch.float64).to(dtype)
    return x, y


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


class TestTarget:
    """A map of one channel whose squares are the attention, so that the target can be read off."""

    @staticmethod
    def target(values: list[float]) -> tuple[Tensor, Tensor, float]:
        """a, the target and r, the target recovered from what the shift added (C = 1)."""
        energy = torch.tensor(values, dtype=torch.float64)
        y_BCHW = energy.sqrt().view(1, 1, 1, -1)
        r = float(energy.norm())
        a_P = energy / max(r, 1e-12)
        return a_P, (ops.shifted_map(y_BCHW, impl="torch") - y_BCHW).view(-1) / r + a_P, r

    def test_what_is_looked_at_is_looked_away_from(self) -> None:
        a_P, target_P, r = self.target([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        # floor(6 / 3) = 2: the threshold is the second smallest, and its own sign is 0
        expected_P = torch.cat([a_P[:1], a_P.new_tensor([r / 2]), r - a_P[2:]])
        torch.testing.assert_close(target_P, expected_P)

    def test_ties_at_the_threshold_all_have_sign_0(self) -> None:
        a_P, target_P, r = self.target([2.0, 1.0, 2.0, 2.0, 5.0, 6.0, 7.0])
        expected_P = torch.cat([torch.full_like(a_P, r / 2)[:4], r - a_P[4:]])
        expected_P[1] = a_P[1]
        torch.testing.assert_close(target_P, expected_P)

    def test_three_pixels_are_enough(self) -> None:
        a_P, target_P, r = self.target([3.0, 1.0, 2.0])
        torch.testing.assert_close(
            target_P, torch.stack([r - a_P[0], a_P.new_tensor(r / 2), r - a_P[2]])
        )


@pytest.mark.parametrize("name", LOSSES)
def test_zero_maps_have_no_gradient_and_no_nan(name: str) -> None:
    x, y = draw()
    zero = torch.zeros_like(x).requires_grad_()
    loss = LOSSES[name](zero, y, impl="torch")
    (grad,) = torch.autograd.grad(loss, zero)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert LOSSES[name](x, zero.detach(), impl="torch").isfinite()


def test_zero_maps_stay_zero() -> None:
    zero = torch.zeros(2, 3, 2, 2)
    assert (ops.attention_map(zero, impl="torch") == 0).all()
    assert (ops.shifted_map(zero, impl="torch") == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_nan_stays_in_its_sample(name: str) -> None:
    x, y = draw()
    x[1, 2, 1, 1] = math.nan
    if name in LOSSES:
        x.requires_grad_()
        loss = LOSSES[name](x, y, impl="torch")
        (result,) = torch.autograd.grad(loss, x)
        assert loss.isnan()
    else:
        result = OPS[name](x, impl="torch")  # type: ignore[operator]
    assert result[1].isnan().any()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_empty_batch(name: str) -> None:
    x, y = draw(B=0)
    x.requires_grad_()
    if name in LOSSES:
        loss = LOSSES[name](x, y, impl="torch")
        (grad,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert grad.shape == x.shape
    else:
        assert OPS[name](x, impl="torch").shape[0] == 0  # type: ignore[operator]


def test_attention_compares_maps_of_different_widths() -> None:
    x, y = draw(C=4)[0], draw(C=7)[0]
    assert ops.attention_transfer(x, y, impl="torch") > 0
    assert ops.attention_diversity(x, y, impl="torch") > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    x, y = draw(dtype=dtype)
    x.requires_grad_()
    loss = LOSSES[name](x, y, impl="torch")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert ops.shifted_map(x, impl="torch").dtype == dtype
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
