"""Small data sets of drawn images in the true sizes, for a dry run of every cell."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import write_photographs
from fastokd.data.sets.cifar import CIFAR

FOLDER = "drawn-images"
# Each run takes one step, is stopped, and takes the others after it is resumed.
FIRST_STEPS, STEPS = 1, 3
BATCH = 4
CIFAR_TRAIN, TESTED = 20, 8
IMAGENET_CLASSES = 1000


def write_drawn(out: Path, datasets: set[str]) -> Path:
    """Writes those of CIFAR-10, CIFAR-100 and ImageNet that are missing; returns the data root.

    CIFAR: 20 training images of noise, 32 x 32. ImageNet: one JPEG of 256 x 256 for each of 1,000
    classes, cut from photographs. Eight test images each.
    """
    root = out / FOLDER
    for name in datasets & CIFAR.keys():
        _once(root / CIFAR[name].folder, partial(_write_cifar, name))
    if "imagenet" in datasets:
        _once(root / "imagenet", _write_imagenet)
    return root


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside its place first, so that a killed process leaves none that is half written."""
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(beside)  # another process was faster


def _write_cifar(name: str, folder: Path) -> None:
    cifar, generator = CIFAR[name], np.random.default_rng(0)
    counts = {**dict.fromkeys(cifar.train, CIFAR_TRAIN // len(cifar.train)), cifar.test: TESTED}
    for part, count in counts.items():
        labels = generator.integers(len(cifar.class_names), size=count).tolist()
        pixels = generator.integers(256, size=(count, 3 * 32 * 32), dtype=np.uint8)
        content = {b"data": pixels, cifar.label.encode(): labels}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))


def _write_imagenet(folder: Path) -> None:
    size = 256, 256
    write_photographs(folder, classes=IMAGENET_CLASSES, train=1, val=1, size=size, spread=0.0)
    for superfluous in sorted((folder / "val").iterdir())[TESTED:]:
        shutil.rmtree(superfluous)
    prepare(folder, imagenet=True, quiet=True)
