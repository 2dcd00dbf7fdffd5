"""Whether the kept student says alone what it says within its cohort, by the engine that trained it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.data import DatasetSplits
from fastokd.errors import UserError
from fastokd.student_file import Weights

# Of the largest logit. Both sides compute in float32, whatever the run's precision, but engines add
# in other orders; a tf32 run multiplies in TF32, which has 10 bits.
TOLERANCE, TF32_TOLERANCE = 1e-3, 2e-2
BATCH = 16


def first_images(data: DatasetSplits) -> Tensor:
    """The first validation (else test) images, uint8 ``[B, H, W, 3]``.

    Raises:
        UserError: they can't be read.
    """
    split = data.test if data.val is None else data.val
    images_BHWC, _ = next(iter(split.stream(min(BATCH, len(split))).batches(0)))
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
    mean_3, std_3 = (
        images_BHWC.new_tensor(alone.fact(n), dtype=torch.float32) for n in ("mean", "std")
    )
    normal_BHWC = (images_BHWC.float() / 255 - mean_3) / std_3
    alone_BC = network(normal_BHWC.permute(0, 3, 1, 2).contiguous())
    furthest = furthest_apart(alone_BC, logits_BC)
    tolerance = TF32_TOLERANCE if precision == "tf32" else TOLERANCE
    if not furthest <= tolerance:
        raise UserError(
            f"the student of {where} gives other logits alone than within its cohort: "
            f"{furthest:.2g} of the largest apart, and at most {tolerance:g} is allowed, so that what "
            f"the run measured isn't what {alone.path} does; its checkpoints are kept: train it with "
            "--engine loop, and report the model"
        )
    return furthest


def furthest_apart(got_BC: Tensor, wanted_BC: Tensor) -> float:
    """The largest difference, as a share of the largest wanted logit."""
    scale = wanted_BC.abs().max().item() or 1.0
    return (got_BC - wanted_BC).abs().max().item() / scale
