"""A data set's splits, in memory or on disk, and how a validation split is held out of train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fastokd.data.disk.split import DiskSplit
from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import UserError
from fastokd.seeds import keyed_generator


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split, on one device.

    Attributes:
        images_NHWC: uint8, three channels.
        labels_N: int64 class ids.
        paths_N: of images from files, their paths from the set's folder, as bytes; else None.
    """

    images_NHWC: Tensor
    labels_N: Tensor
    paths_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.images_NHWC.dtype == torch.uint8
        assert self.images_NHWC.dim() == 4
        assert self.images_NHWC.shape[3] == 3
        assert self.labels_N.dtype == torch.int64
        assert self.labels_N.shape == self.images_NHWC.shape[:1]

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images_NHWC.shape[1], self.images_NHWC.shape[2]

    def to(self, device: torch.device | str) -> Split:
        """The same split on ``device``."""
        return Split(self.images_NHWC.to(device), self.labels_N.to(device), self.paths_N)

    def select(self, indices_M: Tensor) -> Split:
        """The samples at ``indices_M``, in that order."""
        paths_M = None if self.paths_N is None else self.paths_N[indices_M.numpy()]
        return Split(self.images_NHWC[indices_M], self.labels_N[indices_M], paths_M)


@dataclass(frozen=True, eq=False)
class DatasetSplits:
    """A data set, ready to stream.

    Attributes:
        name: as in :func:`fastokd.list_datasets`.
        class_names: the name of each class id.
        preprocessing: how its pictures are preprocessed.
        train, val, test: ``val`` is None if nothing is held out.
        note: remarks on the splits for readers of the results, one a line, or "".
        loader: ``"memory"``, ``"dali"``, ``"nvjpeg"`` or ``"torchvision"``.
        held_out: what was asked for of each split, ``"val"`` or ``"test"``, that is drawn from train
            (:func:`fastokd.data.held_out.hold_out`): a number of images or a fraction.
        left_out: path and fault of each file that can't be used.
        whole_train: the training split of which ``train`` is a part or has other labels
            (:func:`fastokd.data.reduced.reduced`); else None.
        with_held_out: mean and deviation with the held-out images, if measured without them; earlier
            versions trained with these.
    """

    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split | DiskSplit
    val: Split | DiskSplit | None
    test: Split | DiskSplit
    note: str = ""
    loader: str = "memory"
    with_held_out: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    held_out: Mapping[str, int | float] = field(default_factory=dict)
    left_out: tuple[tuple[str, str], ...] = ()
    whole_train: Split | DiskSplit | None = None

    @property
    def mean(self) -> tuple[float, ...]:
        """The channels' mean, for images in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """The channels' standard deviation, for images in [0, 1]."""
        return self.preprocessing.std

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: torch.device | str) -> DatasetSplits:
        """The same splits on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            val=None if self.val is None else self.val.to(device),
            test=self.test.to(device),
        )


def stratified_split(labels_N: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices ``(kept, held)`` in ascending order, with ``count`` samples held out, stratified by class.

    Shares are rounded by largest remainder, so that every class is within one sample of its exact
    share. The result depends only on the labels, ``count`` and ``seed``.
    """
    quota_C = largest_remainder(labels_N, count, "val")
    held_N = draw_members(labels_N, quota_C, keyed_generator(seed, "hold out"))
    return (~held_N).nonzero()[:, 0], held_N.nonzero()[:, 0]


def largest_remainder(labels_N: Tensor, count: int, name: str) -> Tensor:
    """Each class's part of ``count`` images, in proportion to its size; ``name`` is the setting's."""
    N = len(labels_N)
    if not 0 < count < N:
        raise UserError(f"{name} is {count}: it must be between 1 and {N - 1}, train having {N}")
    exact_C = torch.bincount(labels_N).double() * count / N
    quota_C = exact_C.floor().long()
    short = count - int(quota_C.sum())
    quota_C[(exact_C - quota_C).argsort(descending=True, stable=True)[:short]] += 1
    return quota_C


def draw_members(labels_N: Tensor, quota_C: Tensor, generator: torch.Generator) -> Tensor:
    """Marks ``quota_C`` random samples of each class: bool ``[N]``."""
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label, quota in enumerate(quota_C.tolist()):
        members = (labels_N == label).nonzero()[:, 0]
        held_N[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return held_N
