"""KDCL's targets: against plain definitions, and a convex solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from fastokd.cohort import Cohort
from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods import Progress, create_method
from fastokd.methods.kdcl_targets import (
    covariance_weights,
    error_covariance,
    linear_scores,
    min_logits,
    naive_scores,
    weighted_logits,
)


def logits_and_labels(
    S: int, B: int, C: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Students of whom each is right on some samples."""
    labels_B = torch.randint(C, (B,))
    z_SBC = torch.randn(S, B, C, dtype=dtype) * scale
    z_SBC += F.one_hot(labels_B, C) * torch.rand(S, B, 1, dtype=dtype) * 4 * scale
    return z_SBC, labels_B


def lowest_cross_entropy(z_SC: np.ndarray, label: int) -> float:
    """Of any convex combination, by SLSQP from the middle and from near every corner."""
    relative_SC = z_SC - z_SC[:, label : label + 1]

    def loss_and_gradient(a_S: np.ndarray) -> tuple[float, np.ndarray]:
        mixed_C = a_S @ relative_SC
        top = mixed_C.max()
        e_C = np.exp(mixed_C - top)
        return top + math.log(e_C.sum()), relative_SC @ (e_C / e_C.sum())

    S = len(z_SC)
    starts = [np.ones(S) / S, *(0.9 * np.eye(S) + 0.1 / S)]
    return min(
        loss_and_gradient(np.clip(r.x, 0, None) / np.clip(r.x, 0, None).sum())[0]
        for r in (
            minimize(
                loss_and_gradient,
                start,
                jac=True,
                bounds=[(0, 1)] * S,
                constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-12, "maxiter": 300},
            )
            for start in starts
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("S", "C", "scale"), [(2, 10, 3.0), (3, 10, 3.0), (4, 100, 2.0)])
def test_linear_meets_a_convex_solver(S: int, C: int, scale: float, dtype: torch.dtype) -> None:
    z_SBC, labels_B = logits_and_labels(S, 16, C, scale, dtype)
    scores_BSS = linear_scores(z_SBC, labels_B, steps=100)
    assert (scores_BSS[:, 0] == scores_BSS[:, -1]).all()
    weights_BS = scores_BSS[:, 0].softmax(1).double()
    mixed_BC = torch.einsum("bs,sbc->bc", weights_BS, z_SBC.double())
    ours_B = F.cross_entropy(mixed_BC, labels_B, reduction="none")
    best_B = torch.tensor(
        [lowest_cross_entropy(z_SBC[:, b].double().numpy(), int(labels_B[b])) for b in range(16)]
    )
    assert (ours_B - best_B).max() < 1e-4
    alone_B = torch.stack([F.cross_entropy(z, labels_B, reduction="none") for z in z_SBC])
    assert (ours_B <= alone_B.double().amin(0) + 1e-6).all()


def test_naive_listens_to_the_least_wrong_alone() -> None:
    z_SBC, labels_B = logits_and_labels(3, 20, 10, 2.0, torch.float32)
    scores_BSS = naive_scores(z_SBC, labels_B)
    for b, label in enumerate(labels_B):
        losses = [F.cross_entropy(z[b], label) for z in z_SBC]
        best = losses.index(min(losses))
        assert (scores_BSS[b].argmax(1) == best).all()
    assert torch.isinf(scores_BSS).sum() == 20 * 3 * 2


def test_min_logit_is_the_smallest_relative_to_the_true_class() -> None:
    z_SBC, labels_B = logits_and_labels(3, 5, 4, 2.0, torch.float32)
    least_BC = min_logits(z_SBC, labels_B)
    for b, label in enumerate(labels_B):
        for c in range(4):
            expected = min(float(z[b, c] - z[b, label]) for z in z_SBC)
            assert math.isclose(least_BC[b, c], expected, abs_tol=1e-6)
    assert (least_BC.gather(1, labels_B[:, None]) == 0).all()


def test_weights_minimise_the_ensembles_squared_error() -> None:
    """Of all weights that sum to 1, and they may be negative."""
    covariance_SS = torch.tensor([[1.0, 1.1], [1.1, 2.0]]).double()
    weights_S = covariance_weights(covariance_SS)
    torch.testing.assert_close(
        weights_S, torch.tensor([0.9, -0.1]).double() / 0.8, rtol=1e-4, atol=0
    )
    assert weights_S[1] < 0
    best = weights_S @ covariance_SS @ weights_S
    for shift in (-0.05, 0.05):
        other_S = weights_S + torch.tensor([shift, -shift]).double()
        assert other_S @ covariance_SS @ other_S > best


def test_alike_students_are_weighed_alike() -> None:
    weights_S = covariance_weights(torch.ones(3, 3).double())
    torch.testing.assert_close(weights_S, torch.full((3,), 1 / 3).double())
    assert covariance_weights(torch.zeros(3, 3).double()).isfinite().all()


def test_general_is_renewed_from_held_out_images() -> None:
    cohort = Cohort(("resnet8", 3), 10, sharing="network").double().train()
    method = create_method("kdcl", cohort.shape, target="general").double()
    assert method.needs.heldout
    images, labels_B = torch.randn(40, 3, 32, 32).double(), torch.randint(10, (40,))
    before = {key: value.clone() for key, value in cohort.state_dict().items()}
    method.end_epoch(cohort, (images, labels_B))
    assert cohort.training
    for key, value in cohort.state_dict().items():
        assert torch.equal(value, before[key]), key
    probs_SBC = cohort.eval()(images).logits_SBC.softmax(2)
    errors = (probs_SBC - F.one_hot(labels_B, 10)).flatten(1)
    expected_SS = errors @ errors.T / 40
    torch.testing.assert_close(error_covariance(cohort, images, labels_B), expected_SS)
    torch.testing.assert_close(method.weights_S, covariance_weights(expected_SS))
    assert "weights_S" in method.state_dict()

    out = cohort(images)
    target_BC = torch.tensordot(method.weights_S, out.logits_SBC.detach(), dims=1)
    torch.testing.assert_close(method.extras(out, labels_B, Progress.start())[0], target_BC)


def test_only_general_needs_held_out_images() -> None:
    shape = Cohort(("resnet8", 2), 10).shape
    for target in ("naive", "linear", "min_logit"):
        method = create_method("kdcl", shape, target=target)
        assert not method.needs.heldout
        method.end_epoch(None, None)
    with pytest.raises(UserError, match="--val 5000"):
        create_method("kdcl", shape, target="general").end_epoch(None, None)
    with pytest.raises(UserError, match="target is 'max'"):
        create_method("kdcl", shape, target="max")


@pytest.mark.parametrize("target", ["naive", "linear", "min_logit", "general"])
def test_targets_carry_no_gradient(target: str) -> None:
    """The gradient is softmax(z) - onehot + T (q - t): each student's own terms alone."""
    cohort = Cohort(("resnet8", 2), 10).double()
    method = create_method("kdcl", cohort.shape, target=target, linear_steps=5).double()
    out, labels_B = cohort(torch.randn(4, 3, 32, 32).double()), torch.randint(10, (4,))
    out.logits_SBC = out.logits_SBC.detach().requires_grad_()
    method(out, labels_B, Progress.start()).total.backward()
    z = out.logits_SBC.detach()
    target_BC = {
        "naive": lambda: torch.einsum("bs,sbc->bc", naive_scores(z, labels_B)[:, 0].softmax(1), z),
        "linear": lambda: torch.einsum(
            "bs,sbc->bc", linear_scores(z, labels_B, 5)[:, 0].softmax(1), z
        ),
        "min_logit": lambda: min_logits(z, labels_B),
        "general": lambda: z.mean(0),
    }[target]()
    expected = z.softmax(2) - F.one_hot(labels_B, 10)
    expected = expected + 3 * ((z / 3).softmax(2) - (target_BC / 3).softmax(1))
    torch.testing.assert_close(out.logits_SBC.grad, expected / 4)


def test_the_solver_keeps_its_precision_under_autocast() -> None:
    z_SBC, labels_B = logits_and_labels(3, 6, 10, 3.0, torch.float32)
    alone = linear_scores(z_SBC, labels_B, 100)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_scores(z_SBC, labels_B, 100), alone)
        weights_S = torch.tensor([1.1, -0.2, 0.1])
        mixed_BC = weighted_logits(weights_S, z_SBC)
    expected_BC = 1.1 * z_SBC[0] - 0.2 * z_SBC[1] + 0.1 * z_SBC[2]
    torch.testing.assert_close(mixed_BC, expected_BC)


@pytest.mark.parametrize("target", ["naive", "linear", "min_logit", "general"])
def test_the_targets_of_bf16_logits_are_computed_in_fp32(target: str) -> None:
    """Logits as a network under autocast gives them; in bf16 a difference of them would be rounded
    once more, to eight bits."""
    shape = CohortShape(3, 10, "network", (8, 8, 8), None, ((), (), ()))
    method = create_method("kdcl", shape, target=target)
    z_SBC, labels_B = logits_and_labels(3, 12, 10, 3.0, torch.float32)
    logits_SBC = z_SBC.bfloat16()

    def target_of(logits_SBC: Tensor) -> Tensor:
        out = CohortOutput(logits_SBC, (), (), None, None)
        target_BC = method.extras(out, labels_B, Progress.start())
        found = method.scores(out, labels_B, Progress.start()) if target_BC is None else target_BC
        assert found.dtype == (
            torch.float64 if logits_SBC.dtype == torch.float64 else torch.float32
        )
        return found.softmax(-1).double() if target_BC is None else found.double()

    exact = target_of(logits_SBC.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = target_of(logits_SBC)
    # The solver of "linear" ends where the loss descends no further in fp32.
    close = 1e-2 if target == "linear" else 1e-6 * exact.abs().max().item()
    torch.testing.assert_close(ours, exact, rtol=0, atol=close)
