"""A training set with fewer images, and with wrong labels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastokd.data.splits import DatasetSplits
from fastokd.seeds import keyed_generator


def reduced(
    splits: DatasetSplits, *, fraction: float, label_noise: float, seed: int
) -> DatasetSplits:
    """``splits`` with a ``fraction`` of the training images, of whose labels the share ``label_noise``
    is wrong. Validation and test images stay as they are.

    The draws depend only on the labels, the two shares and ``seed``.
    """
    train, whole, said = splits.train, len(splits.train), []
    if fraction < 1:
        train = train.select(chosen(train.labels_N, fraction, seed))
        said.append(f"{len(train):,} of {whole:,} training images are used (fraction {fraction:g})")
    if label_noise > 0:
        noisy_N = noisy(train.labels_N, splits.num_classes, label_noise, seed)
        wrong = int((noisy_N != train.labels_N).sum())
        train = replace(train, labels_N=noisy_N)
        said.append(
            f"{wrong:,} of {len(train):,} training labels are wrong (noise {label_noise:g})"
        )
    if not said:
        return splits
    note = "\n".join(filter(None, (splits.note, *said)))
    return replace(splits, train=train, whole_train=splits.train, note=note)


def chosen(labels_N: Tensor, fraction: float, seed: int) -> Tensor:
    """The ascending indices of ``fraction`` of each class's samples, rounded, at least one.

    The samples of a smaller fraction are among those of a larger one.
    """
    generator = keyed_generator(seed, "fraction")
    parts = []
    for label in range(int(labels_N.max()) + 1):
        members = (labels_N == label).nonzero()[:, 0]
        count = max(1, int(fraction * len(members) + 0.5))
        parts.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(parts).sort().values


def noisy(labels_N: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """``labels_N`` with ``share`` of the labels, rounded, replaced by one of the other classes, each with
    the same probability.

    The wrong labels of a smaller share are among those of a larger one.
    """
    generator = keyed_generator(seed, "label noise")
    order_N = torch.randperm(len(labels_N), generator=generator)
    shift_N = torch.randint(1, num_classes, (len(labels_N),), generator=generator)
    wrong_M = order_N[: int(share * len(labels_N) + 0.5)]
    found_N = labels_N.clone()
    found_N[wrong_M] = (labels_N[wrong_M] + shift_N[wrong_M]) % num_classes
    return found_N
