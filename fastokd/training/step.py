"""One training step: forward, loss, backward, update. Nothing is read back from the device.

    images_BHWC, labels_B -> cohort -> method -> backward -> clip -> optimizers -> average

A step is made of tensors that stay where they are (parameters, ramp, rates, draws), so it can be
compiled, or captured whole as a CUDA graph, and still sees every epoch's values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastokd.distributed.replicas import Replicas
from fastokd.errors import UserError
from fastokd.methods import MethodLoss, Progress
from fastokd.training.captured import CapturedStep

if TYPE_CHECKING:
    from fastokd.training.session import Session

Forward = Callable[[Tensor, Tensor, Progress], tuple[Tensor, MethodLoss]]


def training_step(
    session: Session, images_BHWC: Tensor, labels_B: Tensor
) -> tuple[Tensor, MethodLoss]:
    """One step as the session's options have it: the logits ``[S, B, C]`` and the loss.

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
        self.forward: Forward = self._forward
        if session.choice.compile:
            self.forward = torch.compile(self._forward, dynamic=False)
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
            self.captured = CapturedStep(self.run)

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        if self.captured is not None:
            return self.captured(images_BHWC, labels_B)
        return self.run(images_BHWC, labels_B)

    def run(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        """The step itself."""
        out = self.gradients(images_BHWC, labels_B)
        self.update()
        return out

    def _forward(
        self, images_BHWC: Tensor, labels_B: Tensor, progress: Progress
    ) -> tuple[Tensor, MethodLoss]:
        with self.session.autocast():
            out = self.session.cohort(images_BHWC)
            loss = self.session.method(out, labels_B, progress)
        return out.logits_SBC, loss

    def gradients(self, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
        """Forward and backward of the batch, in one part or in as many as the options say."""
        session, B = self.session, labels_B.shape[0]
        parts = session.parts_of(B)
        if parts == 1:
            logits_SBC, loss = self.forward(images_BHWC, labels_B, session.progress)
            session.scaler.scale(loss.total).backward()
            return logits_SBC, loss
        done: list[tuple[Tensor, MethodLoss]] = []
        for images, labels, progress in _parts(images_BHWC, labels_B, session.progress, parts):
            with self._sending(last=len(done) + 1 == parts):
                logits, loss = self.forward(images, labels, progress)
                share = labels.shape[0] / B
                # Losses are means over the batch: each part counts by its images.
                session.scaler.scale(loss.total * share).backward()
            scaled = {name: value * share for name, value in loss.parts.items()}
            done.append((logits.detach(), MethodLoss(loss.total.detach() * share, scaled)))
        logits_SBC = torch.cat([logits for logits, _ in done], dim=1)
        return logits_SBC, _summed([loss for _, loss in done])

    def _sending(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go to the other ranks with the last part, where there are any."""
        return nullcontext() if last or self.replicas is None else self.replicas.apart()

    def update(self) -> None:
        """The optimizers' step by the gradients as they are; then there are none."""
        session = self.session
        if session.options.clip_norm is not None:
            for optimizer in session.optimizers:
                session.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(session.parameters(), session.options.clip_norm)
        for optimizer in session.optimizers:
            session.scaler.step(optimizer)
            optimizer.zero_grad()
        session.scaler.update()
        if session.average is not None:
            session.average.update()


def _parts(images: Tensor, labels: Tensor, progress: Progress, parts: int) -> Any:
    """The batch in nearly equal parts, each with its part of the draws."""
    drawn = {name: value.tensor_split(parts) for name, value in progress.draws.items()}
    for index, pair in enumerate(
        zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    ):
        draws = {name: values[index] for name, values in drawn.items()}
        yield *pair, dataclasses.replace(progress, draws=draws)


def _summed(losses: list[MethodLoss]) -> MethodLoss:
    names = losses[0].parts
    return MethodLoss(
        torch.stack([loss.total for loss in losses]).sum(),
        {name: torch.stack([loss.parts[name] for loss in losses]).sum(0) for name in names},
    )
