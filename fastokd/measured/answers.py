"""What each student of a run says on every test image, kept in ``answers.safetensors``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastokd.host.names import in_utf8
from fastokd.run.folder import Run

FILE = "answers.safetensors"
# Equal ranges of confidence of a calibration.
BINS = 15
# The most pixels of a side of a kept picture.
SIDE = 64
# Tensors of the file, by the names of their fields. Class ids are kept in 16 bits where they fit.
_TENSORS = {
    "labels_N": torch.int16,
    "choice_MN": torch.int16,
    "confidence_MN": torch.float32,
    "pictured_K": torch.int64,
    "images_KHWC": torch.uint8,
}
_FACTS = {"step": int, "names": list, "kept": int, "classes": list, "precision": str, "how": str}


@dataclass(frozen=True)
class Calibration:
    """One network's confidence and accuracy.

    Attributes:
        count, confidence, correct: of each of :data:`BINS` equal ranges of confidence, the number of
            images, the sum of their confidences, and the number that are right.
    """

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[int, ...]

    @property
    def ece(self) -> float:
        """The expected calibration error (Naeini et al., 2015): sum over bins of
        ``count / N * |correct / count - confidence / count|``."""
        gaps = (abs(a - b) for a, b in zip(self.correct, self.confidence, strict=True))
        return sum(gaps) / sum(self.count)


def pooled(found: Sequence[Calibration]) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each bin that has some, over several runs."""
    points = []
    for index in range(BINS):
        if count := sum(one.count[index] for one in found):
            confidence = sum(one.confidence[index] for one in found)
            correct = sum(one.correct[index] for one in found)
            points.append((confidence / count, correct / count, count))
    return points


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of M networks to N test images, after ``step`` steps; all tensors are on the CPU.

    Attributes:
        labels_N: the class ids, int64.
        choice_MN: the class of the largest logit, int64, the first one of several; -1 where a logit is NaN.
        confidence_MN: the probability of the choice, float32; 0 where there is none.
        names: of each row: ``"student 0"`` and so on, ``"leader"``, ``"average of student 0"``, ``"companion
            of student 0"``, ``"ensemble"``. The last one, of several peers, is the mean of their probabilities.
        kept: the row of the network that the run keeps as ``student.safetensors``.
        classes: the name of each class id.
        precision, how: of the measurement; ``"measured-cpu"`` or ``"measured-gpu"``.
        pictured_K, images_KHWC: indices of the kept network's most confident mistakes, and their pictures,
            uint8, at most :data:`SIDE` pixels a side.
    """

    step: int
    labels_N: Tensor
    choice_MN: Tensor
    confidence_MN: Tensor
    names: tuple[str, ...]
    kept: int
    classes: tuple[str, ...]
    precision: str
    how: str
    pictured_K: Tensor
    images_KHWC: Tensor

    def right(self, row: int) -> Tensor:
        """Whether each answer of a row is right, bool ``[N]``."""
        return self.choice_MN[row] == self.labels_N

    def accuracy(self, row: int) -> float:
        """A row's top-1, from 0 to 1: exactly that of ``metrics.jsonl``."""
        return int(self.right(row).sum()) / len(self.labels_N)

    def by_class(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's accuracy in each class, float64 ``[C]`` with NaN for one without images, and the classes'
        numbers of images, int64 ``[C]``."""
        C = len(self.classes)
        count_C = torch.bincount(self.labels_N, minlength=C)
        right_C = torch.bincount(self.labels_N[self.right(row)], minlength=C)
        return right_C.double() / count_C, count_C

    def confusion_CC(self, row: int) -> Tensor:  # noqa: N802
        """How many images of each class (first index) a row takes for each class (second), int64 ``[C, C]``;
        without those that have no answer."""
        C, choice_N = len(self.classes), self.choice_MN[row]
        pairs = (self.labels_N * C + choice_N)[choice_N >= 0]
        return torch.bincount(pairs, minlength=C * C).view(C, C)

    def mistakes(self, row: int, count: int) -> list[int]:
        """The indices of a row's ``count`` most confident mistakes, the most confident first."""
        wrong_K = (~self.right(row)).nonzero()[:, 0]
        order_K = self.confidence_MN[row, wrong_K].argsort(descending=True, stable=True)
        return [int(index) for index in wrong_K[order_K][:count]]

    def calibration(self, row: int) -> Calibration:
        """A row's calibration. Bin i of 0 to 14 holds confidences in (i / 15, (i + 1) / 15]."""
        confidence_N = self.confidence_MN[row].double()
        bin_N = (confidence_N * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        count_K = torch.bincount(bin_N, minlength=BINS)
        sum_K = torch.bincount(bin_N, confidence_N, minlength=BINS)
        right_K = torch.bincount(bin_N[self.right(row)], minlength=BINS)
        return Calibration(*(tuple(x.tolist()) for x in (count_K, sum_K, right_K)))

    def pictures(self) -> dict[int, bytes]:
        """PNG files of the images of :attr:`pictured_K`, by index."""
        return dict(zip(self.pictured_K.tolist(), map(_as_png, self.images_KHWC), strict=True))

    def to_bytes(self) -> bytes:
        """The file."""
        wide = len(self.classes) > torch.iinfo(torch.int16).max
        kept = {name: getattr(self, name) for name in _TENSORS}
        narrow = {n: x if wide else x.to(_TENSORS[n]) for n, x in kept.items()}
        facts = {name: kind(getattr(self, name)) for name, kind in _FACTS.items()}
        return save({n: x.contiguous() for n, x in narrow.items()}, {"facts": json.dumps(facts)})


def read_answers(run: Run) -> Answers | None:
    """The answers that are kept of the run's newest step; None if there are none, or they are damaged."""
    try:
        with in_utf8(run.folder) as folder, safe_open(folder / FILE, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            found = _from_file({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
            return found if found.step == run.standing.step else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _as_png(image_HWC: Tensor) -> bytes:
    """A uint8 image ``[H, W, 3]`` as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image_HWC.numpy()).save(out, "png", optimize=True)
    return out.getvalue()


def _from_file(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Answers:
    """Raises ValueError, KeyError or TypeError if the file isn't one that :meth:`Answers.to_bytes` made."""
    if any(type(facts[name]) is not kind for name, kind in _FACTS.items()):
        raise TypeError("facts")
    given: dict[str, Any] = {name: facts[name] for name in _FACTS}
    given |= {name: tuple(map(str, given[name])) for name in ("names", "classes")}
    for name, dtype in _TENSORS.items():
        given[name] = tensors[name].long() if dtype == torch.int16 else tensors[name].to(dtype)
    found = Answers(**given)
    M, N, C = len(found.names), len(found.labels_N), len(found.classes)
    in_MN = found.choice_MN, found.confidence_MN
    ids_N, images_KHWC = torch.cat([found.labels_N, found.choice_MN.flatten()]), found.images_KHWC
    fits = (
        all(x.shape == (M, N) for x in in_MN)
        and N > 0
        and 0 <= found.kept < M
        and int(found.labels_N.min()) >= 0
        and -1 <= int(ids_N.min()) <= int(ids_N.max()) < C
        and images_KHWC.dim() == 4
        and images_KHWC.shape[::3] == (*found.pictured_K.shape, 3)
    )
    if not fits:
        raise ValueError("shapes")
    return found
