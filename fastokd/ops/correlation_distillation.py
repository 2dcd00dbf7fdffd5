"""DIST (Huang et al., NeurIPS 2022): probabilities that correlate with the target's.

With Y = softmax(z / T) of the student and of the target, and rho the Pearson correlation of two vectors,
a' a centred one:

    rho(a, b) = a' . b' / (|a'| |b'| + 1e-8)
    inter     = T^2 (1 - the mean over samples of rho over the classes)
    intra     = T^2 (1 - the mean over classes of rho over the batch)
    loss      = beta inter + gamma intra

A sample or class whose probabilities are all the same has rho = 0. ``intra`` couples the samples of the
call: it is over the rank's batch, as published, and over each part of an accumulated one.
"""

from __future__ import annotations

from torch import Tensor

from fastokd.ops._library import define
from fastokd.ops._targets import check, fake, stacked, target_loss

EPS = 1e-8


def correlation_distillation(
    logits_BC: Tensor,
    target_logits_BC: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """beta inter + gamma intra (the equations of this module), a scalar in fp32 (float64 for float64).

    Differentiable once in the student's logits (``impl="torch"``: any number of times).

    Args:
        logits_BC: the student's logits, floating point.
        target_logits_BC: the teacher's; detached.
        beta, gamma: weights of inter and intra, numbers.
        temperature: T > 0, a number. Both terms hold T^2.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Raises:
        UserError: a shape, dtype or number that doesn't fit, an ``impl`` that can't serve the call.
    """
    stacks = stacked(logits_BC, target_logits_BC)
    options = {"beta": beta, "gamma": gamma, "temperature": temperature, "impl": impl}
    return correlation_losses(*stacks, **options)[0]  # type: ignore[arg-type]


def correlation_losses(
    logits_SBC: Tensor,
    target_SBC: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """:func:`correlation_distillation` of S students at once, ``[S]``; the target is ``[1, B, C]`` or
    ``[S, B, C]``."""
    check(logits_SBC, target_SBC, 1, beta=beta, gamma=gamma, temperature=temperature)
    numbers = (float(beta), float(gamma), float(temperature))
    return target_loss(
        "correlation_distillation", impl, _reference, logits_SBC, target_SBC, *numbers
    )


def _reference(
    z_SBC: Tensor, t_SBC: Tensor, beta: float, gamma: float, temperature: float
) -> Tensor:
    if not z_SBC.shape[1]:
        return z_SBC.sum((1, 2))
    y_SBC = (z_SBC / temperature).softmax(-1)
    u_SBC = (t_SBC / temperature).softmax(-1)
    inter_S = 1.0 - _correlation(y_SBC, u_SBC, -1).mean(-1)
    intra_S = 1.0 - _correlation(y_SBC, u_SBC, 1).mean(-1)
    return temperature**2 * (beta * inter_S + gamma * intra_S)


def _correlation(a_SBC: Tensor, b_SBC: Tensor, dim: int) -> Tensor:
    """rho along ``dim``."""
    a_SBC = a_SBC - a_SBC.mean(dim, keepdim=True)
    b_SBC = b_SBC - b_SBC.mean(dim, keepdim=True)
    norms = a_SBC.norm(dim=dim) * b_SBC.norm(dim=dim)
    return (a_SBC * b_SBC).sum(dim) / (norms + EPS)


define(
    "correlation_distillation(Tensor logits_SBC, Tensor target_SBC, float beta, float gamma,"
    " float temperature, bool ask) -> (Tensor loss_S, Tensor gradient_SBC)",
    fake,
    "correlation_distillation.correlation_distillation",
)
