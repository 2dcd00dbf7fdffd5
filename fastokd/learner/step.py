"""One training step. Nothing is read back from the device.

All that a step reads (parameters, ramp, rates, draws) stays in the same tensors, so a step can be
captured as a CUDA graph and still sees the values of every epoch. A step with a value that isn't
finite is skipped by a flag on the device (``guard.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastokd.learner.captured import CapturedStep
from fastokd.learner.guard import Held
from fastokd.learner.learner import Learner
from fastokd.learner.optimizers import step_unless
from fastokd.methods import MethodLoss, Progress
from fastokd.ops.fused_loss import unit_gradient

# The smallest normal number of fp16: with a lower loss scale an overflow isn't the scale's.
SMALLEST_SCALE = 2.0**-14


def step(learner: Learner, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
    """Forward, loss, backward, clip, update, average; the logits ``[S, B, C]`` and the loss."""
    learner.before.take()
    logits_SBC, loss = gradients(learner, images_BHWC, labels_B)
    update(learner, loss)
    # Without their history: a graph's outputs would keep the warm-up's autograd nodes alive.
    return logits_SBC.detach(), MethodLoss(loss.total.detach(), loss.parts)


def update(learner: Learner, loss: MethodLoss) -> None:
    """The part of a step after its :func:`gradients`; the step's :class:`Before` holds its start."""
    if learner.student_parallel is not None:
        learner.student_parallel.level()
    norm = clip(learner)
    untaken = is_untaken(learner, norm)
    for optimizer in learner.optimizers:
        step_unless(optimizer, untaken)
        optimizer.zero_grad()
    with torch.no_grad():
        learner.method.after_step(learner.cohort, learner.progress)
        if loss.kept is not None:
            learner.method.keep(loss.kept, learner.progress, untaken)
    if learner.average is not None:
        learner.average.update(learner.progress.epoch)
    learner.before.put_back(untaken)
    learner.guard.counted()


def training_step(
    learner: Learner, *batch: Any, body: Callable[..., tuple[Tensor, MethodLoss]] = step
) -> tuple[Tensor, MethodLoss]:
    """``body(learner, *batch)``, as a CUDA graph where the learner captures its steps.

    ``batch``: for :func:`step` uint8 images on the learner's device and class ids; ``body`` stays the
    same from one :meth:`Learner.adopt` to the next. What a captured step returns is overwritten by the
    next one.
    """
    learner.guard.begin()
    if not learner.choice.capture:
        return body(learner, *batch)
    if learner.captured is None:
        learner.captured = CapturedStep(
            partial(body, learner), learner.device, warm_up=learner.warm_up
        )
    if not learner.captured.has_run(*batch):
        learner.captured.release()  # this eager step needs the memory of the graphs
    result: tuple[Tensor, MethodLoss] = learner.captured(*batch)
    return result


def gradients(learner: Learner, images_BHWC: Tensor, labels_B: Tensor) -> tuple[Tensor, MethodLoss]:
    """Forward and backward of a batch, in one part or accumulated over several.

    Losses are means over a batch, so a part counts by its share of the images.
    """
    B = labels_B.shape[0]
    count = learner.parts_of(B)
    if count == 1:
        return _part(learner, images_BHWC, labels_B, learner.progress, 1.0, last=True)
    shared = learner.before.read
    if shared is not None:
        shared.take()
    logits, losses, kept = [], [], []
    for i, (images, labels, progress) in enumerate(parts(learner, images_BHWC, labels_B)):
        share = labels.shape[0] / B
        part_SBC, loss = _part(learner, images, labels, progress, share, last=i + 1 == count)
        logits.append(part_SBC.detach())
        losses.append((loss, share))
        kept += [] if loss.kept is None else [loss.kept]
        if shared is not None:
            shared.part(share)
    if shared is not None:
        shared.end()
    total = torch.stack([loss.total.detach() * share for loss, share in losses]).sum()
    terms = {
        name: torch.stack([loss.parts[name] * share for loss, share in losses]).sum(0)
        for name in losses[0][0].parts
    }
    whole = torch.cat(kept, dim=-2) if kept else None
    return torch.cat(logits, dim=1), MethodLoss(total, terms, whole)


def parts(
    learner: Learner, images_BHWC: Tensor, labels_B: Tensor
) -> list[tuple[Tensor, Tensor, Progress]]:
    """The batch in nearly equal parts, each with its part of the method's draws and of mixed labels."""
    count = learner.parts_of(labels_B.shape[0])
    draws = {name: value.tensor_split(count) for name, value in learner.progress.draws.items()}
    mixed: list[tuple[Tensor, Tensor] | None] = [None] * count
    if learner.progress.mixed_with is not None:
        labels2_B, share2_B = learner.progress.mixed_with
        mixed = [*zip(labels2_B.tensor_split(count), share2_B.tensor_split(count), strict=True)]
    return [
        (
            images,
            labels,
            dataclasses.replace(
                learner.progress,
                draws={name: values[i] for name, values in draws.items()},
                mixed_with=mixed[i],
            ),
        )
        for i, (images, labels) in enumerate(
            # B is the fourth dimension from the end, with views before it or not.
            zip(images_BHWC.tensor_split(count, dim=-4), labels_B.tensor_split(count), strict=True)
        )
    ]


def _part(
    learner: Learner,
    images_BHWC: Tensor,
    labels_B: Tensor,
    progress: Progress,
    share: float,
    *,
    last: bool,
) -> tuple[Tensor, MethodLoss]:
    with learner.sending(last):
        logits_SBC, extra_EBC, loss = learner.forward(images_BHWC, labels_B, progress)
        total = loss.total if share == 1 else loss.total * share
        scaled = learner.scaler.scale(total)
        scaled.backward(unit_gradient(scaled))
    learner.guard.check([logits_SBC, extra_EBC, loss.total, *loss.parts.values()])
    return logits_SBC, loss


def clip(learner: Learner) -> Tensor | None:
    """Scales the gradients down to ``clip_norm``; their norm, or None where nothing is clipped."""
    if learner.clip_norm is None:
        return None
    for optimizer in learner.optimizers:
        learner.scaler.unscale_(optimizer)
    students = learner.student_parallel
    norm = clip_grad_norm_ if students is None else students.clip
    return norm(learner.parameters(), learner.clip_norm)


def is_untaken(learner: Learner, norm: Tensor | None) -> Tensor:
    """A 0-d tensor that isn't 0 where the step must be skipped: a value isn't finite."""
    guard = learner.guard
    guard.check(learner.before.statistics.look())
    if learner.scaler.is_enabled():
        return _is_untaken_scaled(learner)
    guard.check([norm, *(p.grad for p in learner.parameters())])
    guard.agree()
    return guard.fault


def _is_untaken_scaled(learner: Learner) -> Tensor:
    """fp16: unscales the gradients and sets the next loss scale.

    Gradients that overflow skip the step and lower the scale; they are no fault until the scale is
    below the smallest normal fp16 number.
    """
    guard, scaler = learner.guard, learner.scaler
    overflows: list[Tensor] = []
    for optimizer in learner.optimizers:
        if learner.clip_norm is None:
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
