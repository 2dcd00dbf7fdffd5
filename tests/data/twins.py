"""Writes small data sets in the file layouts of SVHN, STL-10 and Tiny-ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

STL10 = "airplane bird car cat deer dog horse monkey ship truck"
TINY = {"n01443537": "goldfish, Carassius auratus", "n02124075": "cat", "n02085620": "cat, Felis"}


def write_svhn(root: Path, *, train: int = 30, test: int = 20, seed: int = 0) -> Path:
    """Two MATLAB files, labels counting up from 1 to 10; returns ``root``."""
    generator = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        pixels = generator.integers(256, size=(32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": labels}, do_compression=True)
    return root


def write_stl10(root: Path, *, train: int = 20, test: int = 10, seed: int = 0) -> Path:
    """``stl10_binary/`` with random images, labels counting up from 1 to 10; returns the folder."""
    generator = np.random.default_rng(seed)
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        size = (count, 3, 96, 96)
        (folder / f"{split}_X.bin").write_bytes(generator.bytes(int(np.prod(size))))
        (folder / f"{split}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    (folder / "unlabeled_X.bin").write_bytes(generator.bytes(3 * 96 * 96))
    (folder / "class_names.txt").write_text("\n".join(STL10.split()) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n" * 10)
    return folder


def write_tiny_imagenet(root: Path, *, train: int = 6, val: int = 4, seed: int = 0) -> Path:
    """``tiny-imagenet-200/`` with three classes, ``val/`` flat and shuffled; returns the folder."""
    generator = np.random.default_rng(seed)
    folder = root / "tiny-imagenet-200"

    def save(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(256, size=(64, 64, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        # The real set has some grey pictures.
        (image.convert("L") if path.stem.endswith("_1") else image).save(path)

    for name in TINY:
        for index in range(train):
            save(folder / "train" / name / "images" / f"{name}_{index}.JPEG")
        boxes = "".join(f"{name}_{index}.JPEG\t0\t0\t63\t63\n" for index in range(train))
        (folder / "train" / name / f"{name}_boxes.txt").write_text(boxes)
    truth = generator.permutation([name for name in TINY for _ in range(val)])
    for index, name in enumerate(truth):
        save(folder / "val" / "images" / f"val_{index}.JPEG")
        with open(folder / "val" / "val_annotations.txt", "a") as file:
            file.write(f"val_{index}.JPEG\t{name}\t0\t32\t44\t62\n")
    save(folder / "test" / "images" / "test_0.JPEG")
    (folder / "wnids.txt").write_text("\n".join(reversed(TINY)) + "\n")
    others = {"n00000001": "entity", **TINY}
    (folder / "words.txt").write_text("".join(f"{n}\t{words}\n" for n, words in others.items()))
    return folder
