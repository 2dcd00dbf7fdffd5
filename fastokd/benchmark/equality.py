"""Checks, before anything is timed, that our step computes what the published loop computes.

One step from the same weights on the same images. Its total loss and the gradient of every parameter
are compared with the published loop in float64. The error budget of our step is the error of the
published loop in our precision, plus a small tolerance::

    |ours - exact| <= SLACK * |plain - exact| + TINY * |exact|

The error is the root mean square over all parameters. Each parameter's error is relative to its own
exact gradient, floored at FLOOR of the median gradient. The total loss has LOSS_TINY in place of TINY.
TINY allows for one ReLU whose input is zero up to rounding; a term that is missing or has a wrong
weight changes gradients by more. Tests check that both programs agree in float64 to 1e-9.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastokd.benchmark.loops import OurLoop, PublishedLoop
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe
from fastokd.reference import ReferenceKD, ReferenceOKDDipKD
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

SLACK, TINY, LOSS_TINY, FLOOR = 2.0, 1e-2, 1e-3, 0.05
# Images in the batch: small ones, and large ones (float64 is slow).
BATCH, LARGE_BATCH = 16, 4
# Factor on the weights of fresh classifiers: their flat softmaxes would hide a wrong distillation term.
SHARPER = 8.0


@dataclass(frozen=True)
class StepErrors:
    """Errors of one step against float64, relative to the exact values."""

    ours_loss: float
    plain_loss: float
    ours_grad: float
    plain_grad: float

    @property
    def holds(self) -> bool:
        """Whether our step is within the budget."""
        loss = self.ours_loss <= SLACK * self.plain_loss + LOSS_TINY
        return loss and self.ours_grad <= SLACK * self.plain_grad + TINY


def step_errors(of: Recipe, options: RunOptions) -> StepErrors:
    """One step of ours and of the published loop, in float64 and in our precision.

    Raises:
        UserError: a program can't be built; they have different gradients.
    """
    most = BATCH if of.image_size <= 64 else LARGE_BATCH
    of = dataclasses.replace(of, batch_size=min(of.batch_size, most))
    ours = OurLoop(of, options)
    plain = PublishedLoop.drawn(of, dataclasses.replace(options, precision=ours.precision))
    exact = PublishedLoop.drawn(of, dataclasses.replace(options, precision="fp32"))
    with torch.no_grad():
        for parameter in ours.session.learner.cohort.parameters():
            if parameter.dim() == 2:
                parameter.mul_(SHARPER)
    ours.session.begin_step(of.batch_size)
    exact.model.double()
    exact.x_BCHW = exact.x_BCHW.double()
    for loop in (plain, exact):
        _take(loop, ours.session)
    wanted_loss, wanted = _grads(exact)
    errors = []
    for loss, grads in (_our_grads(ours), _grads(plain)):
        if grads.keys() != wanted.keys():
            raise UserError(f"{of.name} has gradients that its published loop doesn't have")
        relative = ((loss.double() - wanted_loss).abs() / wanted_loss.abs()).item()
        errors.append((relative, _rms(grads, wanted)))
    return StepErrors(errors[0][0], errors[1][0], errors[0][1], errors[1][1])


@torch.no_grad()
def _take(loop: PublishedLoop, session: Session) -> None:
    """Copies our weights, teacher and random draws into the loop."""
    weights = {**session.learner.cohort.state_dict(), **session.learner.method.state_dict()}
    for name, value in loop.model.state_dict().items():
        value.copy_(weights[name])
    dtype, teacher = loop.x_BCHW.dtype, session.learner.cohort.teacher
    if isinstance(loop.model, (ReferenceKD, ReferenceOKDDipKD)):
        assert teacher is not None
        loop.model.set_teacher(copy.deepcopy(teacher).to(dtype))
    for name, value in session.learner.progress.draws.items():
        setattr(loop.model, name, value.to(dtype))


def _our_grads(loop: OurLoop) -> tuple[Tensor, dict[str, Tensor]]:
    session = loop.session
    with session.learner.autocast():
        out = session.learner.cohort(loop.images_BHWC)
        loss = session.learner.method(out, loop.labels_B, session.learner.progress)
    loss.total.backward()
    return loss.total.detach(), _named(session.learner.cohort) | _named(session.learner.method)


def _grads(loop: PublishedLoop) -> tuple[Tensor, dict[str, Tensor]]:
    # Where there are several losses their targets are detached, so their sum has all gradients.
    total = torch.stack([loss for loss, _ in loop.losses()]).sum()
    total.backward()
    return total.detach(), _named(loop.model)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _rms(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    sizes = {name: grad.square().mean().sqrt() for name, grad in exact.items()}
    typical = torch.stack(list(sizes.values())).median()
    errors = [
        (found[name].double() - grad).square().mean() / sizes[name].clamp(min=FLOOR * typical) ** 2
        for name, grad in exact.items()
    ]
    return torch.stack(errors).mean().sqrt().item()
