"""Checks that the written student alone computes the logits that it has in its cohort."""

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

# Allowed difference from the student alone in float64, as a share of the largest logit. The cohort runs
# in float32 (TF32, with 10 bits, in a tf32 run). FACTOR times the error of the student alone in float32
# is added, since some networks amplify rounding.
TOLERANCE, TF32_TOLERANCE, FACTOR = 1e-3, 2e-2, 8
BATCH = 16


def check_kept(learner: Learner, data: DatasetSplits, kept: Weights, run: Path) -> None:
    """Compares a run's written student with ``kept``, the same weights in the cohort. All ranks run
    the cohort; the first reads the file. Warns if the images can't be read.

    Raises:
        UserError: as :func:`alike`.
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
    """The logits ``[B, C]`` of the cohort's ``student`` with the weights ``state``, in eval mode.

    Restores the cohort's weights and mode.
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
    """The largest difference of the student alone from ``logits_BC``, relative to the largest logit.

    Raises:
        UserError: it exceeds the tolerance; the message names ``where``, the run.
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
            f"the student of {where} gives other logits alone than within its cohort: they differ by "
            f"{furthest:.2g} of the largest, more than {allowed:.2g}, so the run's scores don't hold "
            f"for {alone.path}; its checkpoints are kept: train it with another --engine, and report "
            "the model"
        )
    return furthest


def furthest_apart(got_BC: Tensor, wanted_BC: Tensor) -> float:
    """The largest difference, as a share of the largest wanted logit."""
    scale = wanted_BC.abs().max().item() or 1.0
    return (got_BC - wanted_BC).abs().max().item() / scale
