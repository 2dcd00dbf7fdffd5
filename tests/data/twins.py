"""Writes small data sets in the file layouts of SVHN, STL-10, Tiny-ImageNet, Hugging Face's datasets and
WebDataset."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
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


def pictures(count: int, seed: int, size: tuple[int, int] = (40, 32)) -> list[bytes]:
    """Encoded pictures of random pixels, PNG and JPEG in turn."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG" if index % 2 else "PNG")
        made.append(file.getvalue())
    return made


def write_hf(
    root: Path,
    *,
    splits: Mapping[str, int] | None = None,
    classes: tuple[str, ...] = ("cat", "dog"),
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A DatasetDict with so many images in each split, labels in turn, saved with ``save_to_disk``."""
    import datasets

    features = datasets.Features(
        {
            "note": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(classes)),
        }
    )
    made = {}
    for number, (name, count) in enumerate((splits or {"train": 12, "test": 6}).items()):
        rows = [
            {
                "note": "n" * index,
                "image": {"bytes": picture, "path": f"{index}.png"},
                "label": index % len(classes),
            }
            for index, picture in enumerate(pictures(count, seed + number))
        ]
        made[name] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(made).save_to_disk(str(root), num_shards=dict.fromkeys(made, shards))
    return root


def write_shard(path: Path, images: Sequence[bytes], classes: int = 2, first: int = 0) -> Path:
    """A tar archive with an image, its class in turn and a text for each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, image in enumerate(images, first):
            ending = "png" if image.startswith(b"\x89PNG") else "jpg"
            parts = {ending: image, "cls": b"%d" % (index % classes), "txt": b"a picture"}
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{index:06d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_wds(root: Path, *, train: int = 12, test: int = 6, shards: int = 2) -> Path:
    """Shards of both splits, and the names of two classes; returns ``root``."""
    for number, (split, count) in enumerate((("train", train), ("test", test))):
        images = pictures(count, number)
        each = count // shards
        for shard in range(shards):
            some = images[shard * each : (shard + 1) * each]
            write_shard(root / f"{split}-{shard:06d}.tar", some, first=shard * each)
    (root / "classnames.txt").write_text("cat\ndog\n")
    return root
