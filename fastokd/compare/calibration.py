"""How well the kept student's confidence agrees with its accuracy on the test images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.checkpoint import read_object, write_durably
from fastokd.data import DatasetSplits
from fastokd.device import autocast, pick_device
from fastokd.evaluate import evaluation_stream
from fastokd.metrics import label_rank
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights

BINS = 15
# Beside a run's own files: what a comparison measured of its kept student.
FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """The kept student on the test images.

    Attributes:
        top1: its accuracy, a fraction.
        count, confidence, correct: of each of :data:`BINS` equal ranges of confidence, the number of
            images, the sum of their confidences, and the number that are right.
    """

    top1: float
    count: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[int, ...]

    @property
    def ece(self) -> float:
        """The expected calibration error (Naeini et al., 2015): sum over bins of
        ``count / N * |correct / count - confidence / count|``."""
        gaps = (abs(a - b) for a, b in zip(self.correct, self.confidence, strict=True))
        return sum(gaps) / sum(self.count)


def measure_bins(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Counts, confidences and right answers by bin of confidence, float64 ``[3, BINS]``.

    Bin i of 0 to 14 holds confidences in (i / 15, (i + 1) / 15]. NaN is in the first and never right.
    """
    confidence_B = F.softmax(logits_BC.double(), dim=1).max(1).values.nan_to_num(0.0)
    bin_B = (confidence_B * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    correct_B = label_rank(logits_BC[None], labels_B)[0] == 0
    weights_3B = torch.stack([torch.ones_like(confidence_B), confidence_B, correct_B.double()])
    is_bin_BK = bin_B[:, None] == torch.arange(BINS, device=bin_B.device)
    return weights_3B @ is_bin_BK.double()


@torch.no_grad()
def calibration_of(run: Run, data: DatasetSplits, options: RunOptions) -> Calibration:
    """Measures the student that the run keeps, ``student.safetensors``, in the precision of its training;
    kept in :data:`FILE` of the run's folder, and read from there if it is of the same step."""
    path = run.folder / FILE
    step = run.standing.step
    known = read_object(path, "calibration")
    if known.get("step") == step:
        return _from(known)
    device = pick_device(options.device)
    weights = read_weights(run.folder)
    student = weights.build().to(device).eval()
    normalized = weights.preprocessing.normalized
    precision = RunFacts(run.folder).environment().get("precision", "fp32")
    total_3K = torch.zeros(3, BINS, dtype=torch.float64, device=device)
    for images_BHWC, labels_B in evaluation_stream(data.test.to(device)).batches(0):
        with autocast(device, precision):
            logits_BC = student(normalized(images_BHWC)).float()
            if run.recipe.test_flip:
                logits_BC = (logits_BC + student(normalized(images_BHWC.flip(2))).float()) / 2
        total_3K += measure_bins(logits_BC, labels_B)
    count, confidence, correct = total_3K.tolist()
    facts = {
        "step": step,
        "top1": sum(correct) / sum(count),
        "count": [int(n) for n in count],
        "confidence": confidence,
        "correct": [int(n) for n in correct],
    }
    write_durably(path, (json.dumps(facts) + "\n").encode())
    return _from(facts)


def _from(facts: dict[str, Any]) -> Calibration:
    lists = (tuple(facts[name]) for name in ("count", "confidence", "correct"))
    return Calibration(facts["top1"], *lists)


def pooled(found: Sequence[Calibration]) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each bin that has some, over several runs."""
    points = []
    for index in range(BINS):
        if count := sum(one.count[index] for one in found):
            confidence = sum(one.confidence[index] for one in found)
            correct = sum(one.correct[index] for one in found)
            points.append((confidence / count, correct / count, count))
    return points
