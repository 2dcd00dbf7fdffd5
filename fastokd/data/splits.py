"""A data set's splits, in memory or on disk, and how a validation split is held out of train."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    images_NHWC: Tensor
    labels_N: Tensor

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
        return Split(self.images_NHWC.to(device), self.labels_N.to(device))

    def select(self, indices_M: Tensor) -> Split:
        """The samples at ``indices_M``, in that order."""
        return Split(self.images_NHWC[indices_M], self.labels_N[indices_M])


@dataclass(frozen=True, eq=False)
class DatasetSplits:
    """A data set, ready to stream.

    Attributes:
        name: as in :func:`fastokd.list_datasets`.
        class_names: the name of each class id.
        preprocessing: how its pictures are preprocessed.
        train, val, test: ``val`` is None if nothing is held out.
        note: a remark on the splits for readers of the results, or "".
        loader: ``"memory"``, ``"dali"``, ``"nvjpeg"`` or ``"torchvision"``.
        held_out: number of train's images held out for ``val``; 0 if ``val`` is the set's own.
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
    held_out: int = 0

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
    N = len(labels_N)
    if not 0 < count < N:
        raise UserError(f"val is {count}: it must be between 1 and {N - 1}, train having {N}")
    generator = keyed_generator(seed, "hold out")
    sizes_C = torch.bincount(labels_N)
    exact_C = sizes_C.double() * count / N
    quota_C = exact_C.floor().long()
    short = count - int(quota_C.sum())
    quota_C[(exact_C - quota_C).argsort(descending=True, stable=True)[:short]] += 1
    held = torch.zeros(N, dtype=torch.bool)
    for label, quota in enumerate(quota_C.tolist()):
        members = (labels_N == label).nonzero()[:, 0]
        held[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
