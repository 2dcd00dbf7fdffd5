"""Turns a step that runs out of memory into a message with the batch that would fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastokd.device import release_memory
from fastokd.errors import UserError
from fastokd.learner.step import gradients
from fastokd.run.session import Session


@contextmanager
def saying_what_fits(session: Session, *batch: Tensor) -> Iterator[None]:
    """Catches an out-of-memory error of a step and finds a batch that fits, by halving.

    ``batch``: images and labels; without them they are made again. The session can't be used
    afterwards.

    Raises:
        UserError: the step ran out of memory, or an operator has no deterministic form with
            ``deterministic``.
    """
    learner = session.learner
    try:
        yield
        return
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if session.options.deterministic and "does not have a deterministic" in said:
            what = said.partition(" does not have")[0]
            raise UserError(
                f"--deterministic is asked for, but {what} has no deterministic form on "
                f"{learner.device}: leave --deterministic out, or choose another model"
            ) from error
        if not _is_out_of_memory(error):
            raise
        # The frames hold the step's activations.
        traceback.clear_frames(error.__traceback__)
    images_BHWC, labels_B = batch or session.next_batch()
    B = labels_B.shape[0]
    fault = f"a step of {B} images doesn't fit into the memory of {learner.device} ({said})"
    if learner.student_parallel is not None:  # nothing can be tried without the other ranks
        raise UserError(
            f"{fault}: choose a smaller --batch-size, or --accumulate to keep the recipe's"
        )
    fitting = _largest_half(session, images_BHWC, labels_B, -(-B // learner.parts_of(B)))
    if fitting is None:
        advice = "not even a part of one fits: choose a smaller model, or fewer --students"
    else:
        whole, parts = fitting * learner.ranks.data.size, -(-B // fitting)
        advice = f"{fitting} would fit: --batch-size {whole}, or --accumulate {parts} to keep the recipe's"
    raise UserError(f"{fault}; {advice}")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _largest_half(session: Session, images: Tensor, labels: Tensor, size: int) -> int | None:
    """The largest of ``size`` / 2, / 4, ... images whose gradients fit, or None."""
    learner = session.learner
    learner.adopt(replace(learner.choice, compile=False), alone=True)  # each rank tries by itself
    while size > learner.min_batch:
        size = -(-size // 2)
        for parameter in learner.parameters():
            parameter.grad = None
        release_memory(learner.device)
        try:
            session.begin_step(size)
            gradients(learner, images.narrow(-4, 0, size), labels[:size])
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return size
    return None
