"""Writes pictures of Fashion-MNIST as two image folders, to try fine-tuning on photographs without a download.

    python docs/write_fashion_folders.py FASHION_MNIST OUT

``OUT/clothes`` has 5 classes with 600 training and 200 test pictures each, ``OUT/few`` the other 5 with 20
and 200. FASHION_MNIST is the folder of the set's four files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from fastokd.data import Split, load_dataset

CLOTHES = ("t_shirt", "trouser", "pullover", "dress", "coat")
FEW = ("sandal", "shirt", "sneaker", "bag", "boot")
TEST = 200


def write(split: Split, label: int, count: int, folder: Path) -> None:
    """The first ``count`` pictures of a class, 28 x 28."""
    folder.mkdir(parents=True)
    chosen = (split.labels_N == label).nonzero()[:count, 0]
    for index, image_HWC in zip(chosen.tolist(), split.images_NHWC[chosen], strict=True):
        Image.fromarray(image_HWC[2:30, 2:30].numpy()).save(folder / f"{index}.png")


def main(source: Path, out: Path) -> None:
    data = load_dataset("fashion_mnist", source)
    for name, classes, first, count in (("clothes", CLOTHES, 0, 600), ("few", FEW, 5, 20)):
        for label, folder in enumerate(classes, first):
            for split, images, images_a_class in (
                ("train", data.train, count),
                ("test", data.test, TEST),
            ):
                assert isinstance(images, Split)
                write(images, label, images_a_class, out / name / split / folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
