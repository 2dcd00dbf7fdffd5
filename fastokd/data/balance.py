"""How many images each class of a split has, and a sentence where they differ much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastokd.data.disk.split import DiskSplit
from fastokd.data.splits import DatasetSplits, Split

# A split is imbalanced if its largest class is more than so many times its smallest.
RATIO = 2
# Classes named in a sentence; of more, the largest and the smallest.
NAMED = 10
ENDS = 3


def class_counts(split: Split | DiskSplit, num_classes: int) -> Tensor:
    """The number of images of each class of a split in memory or on disk: int64 ``[C]``, on the CPU."""
    return torch.bincount(split.labels_N.cpu(), minlength=num_classes)


def imbalanced(splits: DatasetSplits) -> dict[str, list[int]]:
    """The :func:`class_counts` of each split whose largest class has more than twice its smallest's
    images."""
    found = {}
    for name in ("train", "val", "test"):
        split = getattr(splits, name)
        if split is None or len(split) == 0:
            continue
        counts_C = class_counts(split, splits.num_classes)
        if counts_C.max() > RATIO * counts_C.min():
            found[name] = counts_C.tolist()
    return found


def sentences(facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each imbalanced split of a run's data.json (:func:`fastokd.data.held_out.listed`), with
    the counts in descending order."""
    counts = dict(facts.get("class_counts", {}))
    class_names = counts.pop("names", ())
    said = []
    for split, of_split in counts.items():
        order = sorted(zip(of_split, class_names, strict=True), key=lambda pair: -pair[0])
        texts = [f"{name} {count:,}" for count, name in order]
        if len(texts) > NAMED:
            texts = [*texts[:ENDS], f"{len(texts) - 2 * ENDS} others", *texts[-ENDS:]]
        said.append(f"{split}'s classes are imbalanced: {', '.join(texts)} images")
    return said
