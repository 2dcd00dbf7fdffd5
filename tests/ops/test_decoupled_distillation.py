"""``decoupled_distillation``: the equation, its edges, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops import decoupled_distillation
from fastokd.reference.divergences import decoupled
from tests.ops.target_cases import Drawn, draw, outcome


def test_it_is_the_plain_loop() -> None:
    z_SBC, t_SBC, labels_B = draw(1, 6, 7, dtype=torch.float64)
    z_BC, t_BC = z_SBC[0].requires_grad_(), t_SBC[0].requires_grad_()
    options = {"alpha": 0.3, "beta": 2.0, "temperature": 1.5}
    ours = decoupled_distillation(z_BC, t_BC, labels_B, **options)
    theirs = decoupled(z_BC, t_BC, labels_B, 1.5, 0.3, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, z_BC)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, z_BC)[0])
    assert torch.autograd.gradcheck(
        lambda z: decoupled_distillation(z, t_BC, labels_B, **options), z_BC
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(decoupled_distillation(z_BC.detach(), t_BC, labels_B), t_BC)


def test_the_kl_is_its_two_parts() -> None:
    """T^2 KL = TCKD + (1 - p_y) NCKD of each sample."""
    z_SBC, t_SBC, labels_B = draw(1, 1, 9, dtype=torch.float64)
    z_BC, t_BC = z_SBC[0], t_SBC[0]
    tckd, nckd = (
        decoupled_distillation(z_BC, t_BC, labels_B, alpha=a, beta=1 - a, temperature=2.0)
        for a in (1.0, 0.0)
    )
    p_BC = (t_BC / 2).softmax(1)
    kl = 4 * F.kl_div((z_BC / 2).log_softmax(1), p_BC, reduction="batchmean")
    rest = 1 - p_BC[0, labels_B[0]]
    torch.testing.assert_close(kl, tckd + rest * nckd, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_fp32() -> None:
    z_SBC, t_SBC, labels_B = draw(1, 4, 9, dtype=torch.bfloat16)
    ours = decoupled_distillation(z_SBC[0], t_SBC[0], labels_B)
    wanted = decoupled_distillation(z_SBC[0].double(), t_SBC[0].double(), labels_B)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_no_log_of_nothing(impl: str, cpp_ops: None) -> None:
    """The label's logit is 200 above or below the others, of the student or of the target."""
    z_SBC, t_SBC = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    z_SBC[0, 0, 0], z_SBC[0, 1, 0] = 200.0, -200.0
    t_SBC[0, 2, 0], t_SBC[0, 3, 0] = 200.0, -200.0
    z_SBC[..., 1] = 1.0
    drawn = Drawn(z_SBC, t_SBC, torch.zeros(4, dtype=torch.long))
    loss_S, gradient_SBC = outcome("decoupled", drawn, impl, temperature=1.0)
    assert loss_S.isfinite().all()
    assert gradient_SBC.isfinite().all()
    assert gradient_SBC.abs().amax(-1).min() > 0
    wanted = outcome("decoupled", drawn, "torch", temperature=1.0)
    torch.testing.assert_close((loss_S, gradient_SBC), wanted)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_labels_out_of_range_are_nan_for_their_sample(impl: str, cpp_ops: None) -> None:
    z_SBC, t_SBC, labels_B = draw(2, 4, 6)
    labels_B[1], labels_B[2] = 6, -1
    loss_S, gradient_SBC = outcome("decoupled", Drawn(z_SBC, t_SBC, labels_B), impl)
    assert loss_S.isnan().all()
    assert gradient_SBC[:, 1:3].isnan().all()
    assert gradient_SBC[:, [0, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_no_samples(impl: str, cpp_ops: None) -> None:
    loss_S, gradient_SBC = outcome("decoupled", draw(2, 0, 4), impl)
    assert (loss_S == 0).all()
    assert gradient_SBC.shape == (2, 0, 4)


def test_what_is_wrong_is_named() -> None:
    z_BC, t_BC, labels_B = (x[0] if x.dim() == 3 else x for x in draw(1, 4, 5))
    wrong = [
        ((z_BC[None], t_BC, labels_B), {}, "logits_BC has shape"),
        ((z_BC, t_BC[:, 1:], labels_B), {}, "target's logits are"),
        ((z_BC.long(), t_BC, labels_B), {}, "floating point"),
        ((z_BC[:, :1], t_BC[:, :1], labels_B), {}, "at least 2 classes"),
        ((z_BC, t_BC, labels_B[1:]), {}, "integers"),
        ((z_BC, t_BC, t_BC), {}, "integers"),
        ((z_BC, t_BC, labels_B), {"temperature": 0.0}, "above 0"),
        ((z_BC, t_BC, labels_B), {"alpha": math.nan}, "alpha is nan"),
        ((z_BC, t_BC, labels_B), {"impl": "cuda"}, "choose auto"),
        ((z_BC, t_BC, labels_B), {"impl": "triton"}, "impl='auto' would run"),
    ]
    for arguments, options, said in wrong:
        with pytest.raises(UserError, match=said):
            decoupled_distillation(*arguments, **options)  # type: ignore[arg-type]
