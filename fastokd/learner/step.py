"""One training step: forward, loss, backward, update. Nothing is read back from the device.

    images_BHWC, labels_B -> cohort -> method -> backward -> clip -> optimizers -> average

A step is made of tensors that stay where they are (parameters, ramp, rates, draws), so it can be
compiled, or captured whole as a CUDA graph, and still sees every epoch's values. It is taken whole,
or not at all where something in it isn't finite (``guard.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.learner.guard import Held, Shared
from fastokd.learner.optimizers import made_ready, step_unless
from fastokd.learner.replicas import Replicas
from fastokd.methods import MethodLoss, Progress

if TYPE_CHECKING:
    from fastokd.run.session import Session

Forward = Callable[[Tensor, Tensor, Progress], tuple[Tensor, Tensor | None, MethodLoss]]
# The smallest normal number of fp16: a loss scale below it can't be what a gradient overflows by.
SMALLEST_SCALE = 2.0**-14


def training_step(
    session: Session, images_BHWC: Tensor, labels_B: Tensor
) -> tuple[Tensor, MethodLoss]:
    """One step as the session's options have it: the logits ``[S, B, C]`` and the loss, detached.

    ``images_BHWC``: uint8, on the session's device; ``labels_B``: class ids. In a captured step
    what is returned is overwritten by the next one.
    """
    return session.step_program(images_BHWC, labels_B)


class StepProgram:
    """The step of one session by its present choice of engine and compiler.

    Raises:
        UserError: a captured step is asked for where there is no GPU.
    """

    def __init__(self, session: Session, *, alone: bool = False) -> None:
        self.session = session
        self.forward: Forward = self.eager
        if session.choice.compile:
            self.forward = torch.compile(self.eager, dynamic=False)
        self.replicas: Replicas | None = None
        if session.ranks.data.size > 1 and not alone:
            self.forward = self.replicas = Replicas(session, self.forward)
        self.captured: CapturedStep | None = None
        if session.options.capture:
            if session.device.type != "cuda":
                raise UserError(
                    f"capture is asked for on {session.device}, but only a GPU has graphs: "
                    "leave --capture out"
                )
            self.captured = CapturedStep(self.run, session.device)
        self._held: tuple[Held, Held] | None = None
        self._read: Shared | None = None

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        self.session.guard.begin()
        if self.captured is not None:
            return self.captured(images_BHWC, labels_B)
        return self.run(images_BHWC, labels_B)

    def run(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        """The step itself."""
        for held in self.held:
            held.take()
        logits_SBC, loss = self.gradients(images_BHWC, labels_B)
        if self.session.row is not None:
            self.session.row.level()
        self.update()
        self.session.guard.counted()
        # Without their history: a graph's outputs would keep the warm-up's autograd nodes alive.
        return logits_SBC.detach(), MethodLoss(loss.total.detach(), loss.parts)

    @property
    def held(self) -> tuple[Held, Held]:
        """What a step writes in place and no optimizer holds back: the norms' statistics, the rest."""
        if self._held is None:
            session = self.session
            statistics = running_statistics(session.cohort, session.method)
            known = {id(x) for x in statistics}
            rest = [x for m in (session.cohort, session.method) for x in m.buffers()]
            if session.average is not None:
                rest += session.average.tensors()
            for optimizer in session.optimizers:
                rest += made_ready(optimizer)
            self._held = Held(statistics), Held(x for x in rest if id(x) not in known)
        return self._held

    @property
    def read(self) -> Shared | None:
        """The running statistics that the method reads while it trains, if it does."""
        if self._read is None and self.session.method.needs.running_statistics:
            self._read = Shared(running_statistics(self.session.method))
        return self._read

    def eager(
        self, images_BHWC: Tensor, labels_B: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor | None, MethodLoss]:
        """The forward as it is written: the students' logits, a teacher's, the loss."""
        with self.session.autocast():
            out = self.session.cohort(images_BHWC)
            loss = self.session.method(out, labels_B, progress)
            if self.session.row is not None:
                loss = self.session.row.whole(loss)
        return out.logits_SBC, out.extra_logits_EBC, loss

    def gradients(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        """Forward and backward of the batch, in one part or in as many as the options say."""
        session, done, taken = self.session, [], 0.0
        read = self.read if session.parts_of(labels_B.shape[0]) > 1 else None
        if read is not None:
            read.take()
        for images, labels, progress, share in self.parts(images_BHWC, labels_B):
            taken += share
            with self._sending(last=taken > 1 - share / 2):
                logits_SBC, extra_EBC, loss = self.forward(images, labels, progress)
                whole = share == 1
                session.scaler.scale(loss.total if whole else loss.total * share).backward()
            session.guard.check([logits_SBC, extra_EBC, loss.total, *loss.parts.values()])
            if whole:
                return logits_SBC, loss
            if read is not None:
                read.part(share)
            scaled = {name: value * share for name, value in loss.parts.items()}
            done.append((logits_SBC.detach(), MethodLoss(loss.total.detach() * share, scaled)))
        if read is not None:
            read.end()
        logits_SBC = torch.cat([logits for logits, _ in done], dim=1)
        return logits_SBC, _summed([loss for _, loss in done])

    def _sending(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go to the other ranks with the last part, where there are any."""
        return nullcontext() if last or self.replicas is None else self.replicas.apart()

    def parts(
        self, images_BHWC: Tensor, labels_B: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Progress, float]]:
        """The batch in nearly equal parts, each with its part of the draws, and its share: losses
        are means over the batch, so each part counts by its images."""
        progress, B = self.session.progress, labels_B.shape[0]
        parts = self.session.parts_of(B)
        if parts == 1:
            yield images_BHWC, labels_B, progress, 1.0
            return
        drawn = {name: value.tensor_split(parts) for name, value in progress.draws.items()}
        for index, (images, labels) in enumerate(
            zip(images_BHWC.tensor_split(parts), labels_B.tensor_split(parts), strict=True)
        ):
            draws = {name: values[index] for name, values in drawn.items()}
            share = labels.shape[0] / B
            yield images, labels, dataclasses.replace(progress, draws=draws), share

    def update(self) -> None:
        """The optimizers' step by the gradients as they are; then there are none."""
        session, guard, scaler = self.session, self.session.guard, self.session.scaler
        statistics, rest = self.held
        norm: Tensor | None = None
        if session.options.clip_norm is not None:
            for optimizer in session.optimizers:
                scaler.unscale_(optimizer)
            clip = clip_grad_norm_ if session.row is None else session.row.clip
            norm = clip(session.parameters(), session.options.clip_norm)
        guard.check(statistics.look())
        if scaler.is_enabled():
            untaken = self._scaled()
        else:
            guard.check([norm, *(p.grad for p in session.parameters())])
            guard.agree()
            untaken = guard.fault
        for optimizer in session.optimizers:
            step_unless(optimizer, untaken)
            optimizer.zero_grad()
        if session.average is not None:
            session.average.update()
        statistics.put_back(untaken)
        rest.put_back(untaken)

    def _scaled(self) -> Tensor:
        """fp16's part: unscales, sets the next scale, and says whether the step is left out.

        Gradients that overflow are what the scale is for: no fault, unless it falls to nothing.
        """
        session, guard, scaler = self.session, self.session.guard, self.session.scaler
        overflows: list[Tensor] = []
        for optimizer in session.optimizers:
            if session.options.clip_norm is None:
                scaler.unscale_(optimizer)
            overflows += scaler._found_inf_per_device(optimizer).values()
        scale, growth = scaler._scale, scaler._growth_tracker
        assert scale is not None
        assert growth is not None
        torch.maximum(guard.fault, (scale < SMALLEST_SCALE).float(), out=guard.fault)
        guard.agree()
        held = Held([scale, growth])
        held.take()
        scaler.update()
        held.put_back(guard.fault)
        return torch.stack([guard.fault, *overflows]).amax()


def running_statistics(*modules: nn.Module) -> list[Tensor]:
    """The running means and variances of all norms."""
    norms = [
        n for m in modules for n in m.modules() if isinstance(n, nn.modules.batchnorm._NormBase)
    ]
    return [x for n in norms for x in (n.running_mean, n.running_var) if x is not None]


def _summed(losses: list[MethodLoss]) -> MethodLoss:
    names = losses[0].parts
    return MethodLoss(
        torch.stack([loss.total for loss in losses]).sum(),
        {name: torch.stack([loss.parts[name] for loss in losses]).sum(0) for name in names},
    )
