"""Whether our step computes what the published loop computes, before either is timed.

From the same weights, on the same images, one step's total loss and the gradient of every
parameter, each beside the published loop in float64. Ours may be as far from that as the published
loop itself is in our precision (eager, by hand), and a little besides::

    |ours - exact| <= SLACK * |plain - exact| + TINY * |exact|

in the root mean square over all parameters, large and small: each one's error is taken in units of
its own exact gradient, floored at FLOOR of the typical one. The total has LOSS_TINY. TINY lets one ReLU, whose input is zero
but for rounding, be open in one program and shut in the other; a term that is missing or weighed
wrongly moves gradients by more. That the programs are the same in float64, to 1e-9, is for the
tests.
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
# Of small images, and of large ones, where float64 takes its time.
BATCH, LARGE_BATCH = 16, 4
# Fresh classifiers give flat softmaxes, in which a wrong distillation term hardly shows.
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
        """Whether ours is within the budget."""
        loss = self.ours_loss <= SLACK * self.plain_loss + LOSS_TINY
        return loss and self.ours_grad <= SLACK * self.plain_grad + TINY


def step_errors(of: Recipe, options: RunOptions) -> StepErrors:
    """One step of ours and of the published loop, in float64 and in our precision.

    Raises:
        UserError: what either raises when it is built.
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
    wanted = _grads(exact)
    errors = []
    for loss, grads in (_our_grads(ours), _grads(plain)):
        if grads.keys() != wanted[1].keys():
            raise UserError(f"{of.name} has gradients that its published loop doesn't have")
        errors.append((_relative(loss, wanted[0]), _rms(grads, wanted[1])))
    return StepErrors(errors[0][0], errors[1][0], errors[0][1], errors[1][1])


@torch.no_grad()
def _take(loop: PublishedLoop, session: Session) -> None:
    """Gives the loop our weights, our teacher and our draws."""
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
    losses = [loss for loss, _ in loop.losses()]
    # Targets are detached where there are several, so that one sum has all their gradients.
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), _named(loop.model)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs() / exact.abs()).item()


def _rms(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    sizes = {name: grad.square().mean().sqrt() for name, grad in exact.items()}
    typical = torch.stack(list(sizes.values())).median()
    errors = [
        (found[name].double() - grad).square().mean() / sizes[name].clamp(min=FLOOR * typical) ** 2
        for name, grad in exact.items()
    ]
    return torch.stack(errors).mean().sqrt().item()
