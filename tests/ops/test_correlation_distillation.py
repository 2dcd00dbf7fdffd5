"""``correlation_distillation``: the equation, its edges, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastokd.errors import UserError
from fastokd.ops import correlation_distillation
from fastokd.reference.divergences import correlated
from tests.ops.target_cases import draw, outcome


def test_it_is_the_plain_loop() -> None:
    z_SBC, t_SBC, labels_B = draw(1, 6, 7, dtype=torch.float64)
    z_BC, t_BC = z_SBC[0].requires_grad_(), t_SBC[0].requires_grad_()
    options = {"beta": 0.3, "gamma": 2.0, "temperature": 1.5}
    ours = correlation_distillation(z_BC, t_BC, **options)
    theirs = correlated(z_BC, t_BC, labels_B, 1.5, 0.3, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, z_BC)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, z_BC)[0])
    assert torch.autograd.gradcheck(lambda z: correlation_distillation(z, t_BC, **options), z_BC)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(correlation_distillation(z_BC.detach(), t_BC), t_BC)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_what_is_constant_correlates_with_nothing(impl: str, cpp_ops: None) -> None:
    """One sample: every class is constant over the batch. One class: every sample is."""
    for B, C in ((1, 6), (4, 1)):
        drawn = draw(2, B, C)
        loss_S, gradient_SBC = outcome(
            "correlation", drawn, impl, beta=0.0 if B == 1 else 1.0, gamma=1.0 if B == 1 else 0.0
        )
        torch.testing.assert_close(loss_S, torch.full((2,), 4.0))
        assert not gradient_SBC.any()
    loss_S, gradient_SBC = outcome("correlation", draw(2, 0, 4), impl)
    assert (loss_S == 0).all()
    assert gradient_SBC.shape == (2, 0, 4)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_equal_probabilities_correlate_wholly(impl: str, cpp_ops: None) -> None:
    drawn = draw(1, 6, 5)
    drawn = drawn._replace(logits_SBC=drawn.target_SBC)
    loss_S, _ = outcome("correlation", drawn, impl)
    torch.testing.assert_close(loss_S, torch.zeros(1), atol=1e-5, rtol=0.0)


def test_what_is_wrong_is_named() -> None:
    z_BC, t_BC = (x[0] for x in draw(1, 4, 5)[:2])
    wrong = [
        ((z_BC[0], t_BC), {}, "logits_BC has shape"),
        ((z_BC, t_BC[1:]), {}, "target's logits are"),
        ((z_BC, t_BC), {"temperature": -1.0}, "above 0"),
        ((z_BC, t_BC), {"gamma": float("inf")}, "gamma is inf"),
        ((z_BC, t_BC), {"impl": "triton"}, "can't run as impl='triton'"),
    ]
    for arguments, options, said in wrong:
        with pytest.raises(UserError, match=said):
            correlation_distillation(*arguments, **options)  # type: ignore[arg-type]
