"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastokd.data.disk.prepared import load_prepared
from fastokd.data.disk.scan import statistics_of
from fastokd.data.held_out import Share, hold_out
from fastokd.data.packed.load import load_packed
from fastokd.data.preprocessing import Preprocessing, preprocessing_of
from fastokd.data.sets.cifar import load_cifar
from fastokd.data.sets.digits import load_digits_splits
from fastokd.data.sets.fashion_mnist import load_fashion_mnist
from fastokd.data.sets.folder import channel_statistics, load_folder
from fastokd.data.sets.glyphs import load_glyphs
from fastokd.data.sets.stl10 import load_stl10
from fastokd.data.sets.svhn import load_svhn
from fastokd.data.sets.tiny_imagenet import load_tiny_imagenet
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError, unknown_name
from fastokd.known import DATASETS, STREAMED, place_of


class _Request(NamedTuple):
    """The arguments of :func:`load_dataset`; each data set reads those that it needs."""

    root: Path | None
    download: bool
    shown: Preprocessing
    streamed: bool
    loader: str
    workers: int
    begun: bool
    device: torch.device
    own_test: bool
    kept: Mapping[str, Any] | None


_LOADERS: dict[str, Callable[[_Request], DatasetSplits]] = {
    "cifar10": lambda ask: load_cifar("cifar10", ask.root, download=ask.download),
    "cifar100": lambda ask: load_cifar("cifar100", ask.root, download=ask.download),
    "digits": lambda ask: load_digits_splits(),
    "fashion_mnist": lambda ask: load_fashion_mnist(ask.root, download=ask.download),
    "glyphs": lambda ask: load_glyphs(ask.root),
    "hf": lambda ask: _packed("hf", ask),
    "imagefolder": lambda ask: (
        _prepared("imagefolder", ask)
        if ask.streamed
        else load_folder(ask.root, ask.shown, begun=ask.begun, kept=ask.kept, own_test=ask.own_test)
    ),
    "imagenet": lambda ask: _prepared("imagenet", ask),
    "stl10": lambda ask: load_stl10(ask.root, download=ask.download),
    "svhn": lambda ask: load_svhn(ask.root, download=ask.download),
    "tiny_imagenet": lambda ask: load_tiny_imagenet(
        ask.root, ask.shown, download=ask.download, begun=ask.begun, kept=ask.kept
    ),
    "wds": lambda ask: _packed("wds", ask),
}
# Data sets whose image size can be chosen.
_CHOOSABLE = (*STREAMED, "tiny_imagenet")
# Data sets whose mean and deviation are measured on train; those of the others are published.
_MEASURED = ("hf", "imagefolder", "wds")


def _prepared(name: str, ask: _Request) -> DatasetSplits:
    return load_prepared(
        name,
        ask.root,
        ask.shown,
        loader=ask.loader,
        workers=ask.workers,
        begun=ask.begun,
        device=ask.device,
        own_test=ask.own_test,
    )


def _packed(name: str, ask: _Request) -> DatasetSplits:
    return load_packed(
        name,
        ask.root,
        ask.shown,
        streamed=ask.streamed,
        loader=ask.loader,
        workers=ask.workers,
        begun=ask.begun,
        kept=ask.kept,
        own_test=ask.own_test,
    )


def load_dataset(
    name: str,
    root: Path | None = None,
    *,
    val: Share = 0,
    test: Share = 0,
    download: bool = False,
    image_size: int | None = None,
    eval_resize: int | None = None,
    streamed: bool = False,
    loader: str = "auto",
    workers: int = 0,
    begun: bool = False,
    device: torch.device | str = "cpu",
    kept: Mapping[str, Any] | None = None,
) -> DatasetSplits:
    """A data set on the CPU: in memory as uint8 ``[N, H, W, 3]``, or as files on disk.

    Args:
        name: as in :func:`fastokd.list_datasets`; of ``hf`` and ``wds`` it may say where the set is,
            as ``hf:PATH``, unless ``root`` does.
        root: the folder that holds its files (docs/data.md); ``digits`` needs none, and
            ``fashion_mnist`` none if Debian's package is installed.
        val: images held out of train, stratified by class: a number, or a fraction of each class;
            0 for none. ``digits``, and image folders with ``val/`` and ``test/``, have a validation
            split already. The choice of images depends only on the labels, ``val`` and ``test``: it
            is the same for all seeds, and for a teacher with the same ``val`` and ``test``.
        test: the same, for an image folder without ``test/``. A folder with neither ``val/`` nor
            ``test/``, or with the classes' folders directly below it, is always split; ``val`` and
            ``test`` are then 0.1 each unless given.
        download: download missing files into ``root`` (CIFAR, Fashion-MNIST, STL-10, SVHN, Tiny-ImageNet).
        image_size: height and width of the images of an ``imagefolder``, ``hf`` or ``wds`` (32 unless said), of
            ``imagenet`` (224) or of ``tiny_imagenet`` (64); other sets have one size, STL-10 96 and the
            others 32.
        eval_resize: the shorter side before the centre crop of a held-out image; 0 for
            ``image_size``. In memory, the images to train on are the same crops.
        streamed: read an ``imagefolder``, ``hf`` or ``wds`` from disk during training, as ``imagenet``.
        loader: the decoder of images on disk: ``"auto"``, ``"dali"``, ``"nvjpeg"`` or
            ``"torchvision"``.
        workers: threads of DALI or nvJPEG, or processes of torchvision; 0 for this process's cores.
        begun: the run has begun already: a warning, not an error, if a prepared folder has changed
            since.
        device: where the batches will be used, on which the loader ``"auto"`` depends. The data set
            is on the CPU until :meth:`DatasetSplits.to`.
        kept: what the run keeps of its data, if it has begun: its files of each split, which replace
            the draw.

    Raises:
        UserError: an unknown name; files that are missing, empty or damaged; labels out of range;
            a ``val`` or ``test`` that can't be held out; a loader that isn't available.
    """
    name, place = place_of(name)
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    if root is None and place:
        root = Path(place)
    own = preprocessing_of(name).input_size
    if image_size not in (None, own) and name not in _CHOOSABLE:
        raise UserError(f"image_size is {image_size}, but {name} is shown at {own}: leave it out")
    if eval_resize and name not in _CHOOSABLE:
        raise UserError(f"eval_resize is {eval_resize}, but {name} is shown as it is: leave it out")
    shown = preprocessing_of(name, image_size=image_size, eval_resize=eval_resize)
    splits = _LOADERS[name](
        _Request(
            root,
            download,
            shown,
            streamed,
            loader,
            workers,
            begun,
            torch.device(device),
            own_test=test == 0,
            kept=kept,
        )
    )
    splits = hold_out(splits, {"test": test, "val": val}, kept)
    return _measured_again(splits) if splits.held_out and name in _MEASURED else splits


def _measured_again(splits: DatasetSplits) -> DatasetSplits:
    """With mean and deviation measured on the remaining training images."""
    train = splits.train
    if isinstance(train, Split):
        mean, std = channel_statistics(train)
    else:
        counted_M7 = torch.empty(0, 7) if train.sums_N7 is None else train.sums_N7
        counted_M7 = counted_M7[counted_M7[:, 0] > 0]
        if len(counted_M7) == 0:  # a manifest of an earlier version
            return splits
        mean, std = statistics_of(counted_M7.numpy())
    shown = replace(splits.preprocessing, mean=mean, std=std)
    return replace(splits, preprocessing=shown, with_held_out=(splits.mean, splits.std))
