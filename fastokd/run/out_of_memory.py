"""Turns a step that runs out of memory into a message with the batch that would fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastokd.cohort import Choice
from fastokd.errors import UserError
from fastokd.learner.step import gradients
from fastokd.run.session import Session


@contextmanager
def saying_what_fits(session: Session, images_BHWC: Tensor, labels_B: Tensor) -> Iterator[None]:
    """Catches an out-of-memory error of a step and finds a batch that fits, by halving.

    The session can't be used afterwards.

    Raises:
        UserError: the step ran out of memory, or an operator has no deterministic form with
            ``deterministic``.
    """
    refused = ""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if session.options.deterministic and "does not have a deterministic" in said:
            what = said.partition(" does not have")[0]
            raise UserError(
                f"--deterministic is asked for, but {what} has no deterministic form on "
                f"{session.learner.device}: leave --deterministic out, or choose another model"
            ) from error
        if not _is_out_of_memory(error):
            raise
        refused = str(error).splitlines()[0]
        # The frames hold the step's activations.
        traceback.clear_frames(error.__traceback__)
    if not refused:
        return
    B, ranks = labels_B.shape[0], session.learner.ranks.data.size
    parts = session.learner.parts_of(B)
    # Students spread over ranks: nothing can be tried without the other ranks.
    if session.learner.student_parallel is not None:
        raise UserError(
            f"a step of {B} images doesn't fit into the memory of {session.learner.device} ({refused}): "
            "choose a smaller --batch-size, or --accumulate to keep the recipe's"
        )
    fitting = _largest_half(session, images_BHWC, labels_B, -(-B // parts))
    if fitting is None:
        advice = "not even a part of one fits: choose a smaller model, or fewer --students"
    else:
        advice = (
            f"{fitting} would fit: --batch-size {fitting * ranks}, or --accumulate {-(-B // fitting)} to "
            "keep the recipe's"
        )
    raise UserError(
        f"a step of {B} images doesn't fit into the memory of {session.learner.device} ({refused}); {advice}"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _largest_half(session: Session, images: Tensor, labels: Tensor, size: int) -> int | None:
    """The largest of ``size`` / 2, / 4, ... images whose gradients fit, or None."""
    choice = Choice(session.learner.choice.engine, False, session.learner.choice.memory_format)
    session.learner.adopt(choice, alone=True)  # each rank tries by itself
    while size > session.learner.min_batch:
        size = -(-size // 2)
        for parameter in session.learner.parameters():
            parameter.grad = None
        if session.learner.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            session.begin_step(size)
            gradients(session.learner, images[:size], labels[:size])
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return size
    return None
