"""Whether the kept student says alone what it says within its cohort, by the engine that trained it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.data import DatasetSplits, stream_of
from fastokd.distributed.ranks import speaks
from fastokd.errors import UserError, warn
from fastokd.learner.learner import Learner
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT, Weights

# Of the largest logit, from the student alone in float64. The cohort computes in float32, whatever the
# run's precision; a tf32 run's multiplies in TF32, which has 10 bits. FACTOR: how many times further
# than the student alone in float32 it may be besides, where a network amplifies rounding.
TOLERANCE, TF32_TOLERANCE, FACTOR = 1e-3, 2e-2, 8
BATCH = 16


def check_kept(learner: Learner, data: DatasetSplits, kept: Weights, run: Path) -> None:
    """Compares the student that a run has written with ``kept``, the same out of the learner, within
    the cohort. All ranks run the cohort, and the first reads the file.

    Raises:
        UserError: as :func:`alike`. Images that can't be read are warned of.
    """
    try:
        images_BHWC = learner.ranks.first(lambda: first_images(data).cpu())
    except UserError as error:
        if speaks():
            warn(f"{error} (the student wasn't compared within its cohort)")
        return
    images_BHWC = images_BHWC.to(learner.device)
    logits_BC = within_cohort(learner.cohort, kept.fact("student"), kept.state, images_BHWC)
    file = run / STUDENT
    learner.ranks.first(
        lambda: alike(logits_BC, read_weights(file), images_BHWC, learner.precision, run)
    )


def first_images(data: DatasetSplits) -> Tensor:
    """The first validation (else test) images, uint8 ``[B, H, W, 3]``.

    Raises:
        UserError: they can't be read.
    """
    split = data.test if data.val is None else data.val
    images_BHWC, _ = next(iter(stream_of(split, min(BATCH, len(split))).batches(0)))
    return images_BHWC


@torch.no_grad()
def within_cohort(
    cohort: Cohort, student: int, state: dict[str, Tensor], images_BHWC: Tensor
) -> Tensor:
    """The logits ``[B, C]`` of a student of the cohort in eval mode, with the weights ``state``.

    The cohort is left as it was.
    """
    live, training = cohort.student_state(student), cohort.training
    before = {key: value.clone() for key, value in live.items()}
    cohort.eval()
    try:
        for key, value in live.items():
            value.copy_(state[key])
        return cohort(images_BHWC).logits_SBC[student].float()
    finally:
        for key, value in live.items():
            value.copy_(before[key])
        cohort.train(training)


@torch.no_grad()
def alike(
    logits_BC: Tensor, alone: Weights, images_BHWC: Tensor, precision: str, where: Path
) -> float:
    """How far the student alone is from ``logits_BC``, as a share of the largest.

    Raises:
        UserError: further than the tolerance; the message names ``where``, the run.
    """
    network = alone.build().to(images_BHWC.device)
    shown = alone.preprocessing
    own_BC = network(shown.normalized(images_BHWC))
    try:
        exact_BC = network.double()(shown.normalized(images_BHWC, torch.float64))
    except RuntimeError:  # a network that casts to float32 itself
        exact_BC = own_BC
    furthest = furthest_apart(logits_BC, exact_BC)
    allowed = TF32_TOLERANCE if precision == "tf32" else TOLERANCE
    allowed += FACTOR * furthest_apart(own_BC, exact_BC)
    if not furthest <= allowed:
        raise UserError(
            f"the student of {where} gives other logits alone than within its cohort: "
            f"{furthest:.2g} of the largest apart, and at most {allowed:.2g} is allowed, so that what "
            f"the run measured isn't what {alone.path} does; its checkpoints are kept: train it with "
            "another --engine, and report the model"
        )
    return furthest


def furthest_apart(got_BC: Tensor, wanted_BC: Tensor) -> float:
    """The largest difference, as a share of the largest wanted logit."""
    scale = wanted_BC.abs().max().item() or 1.0
    return (got_BC - wanted_BC).abs().max().item() / scale
