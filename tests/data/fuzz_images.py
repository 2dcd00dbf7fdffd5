"""Damaged images through everything that decodes one: ``prepare``, and all loaders.

    python -m tests.data.fuzz_images FOLDER COUNT SEED

Of COUNT damaged images ``prepare`` quarantines some. The others, and whole ones that are damaged
afterwards without a change of size, go to the loaders (nvJPEG's with libjpeg): they decode them, or
raise a DataFileError with the file's name. Prints what it counted.
"""

from __future__ import annotations

import io
import json
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastokd.data import stream_of
from fastokd.data.decode import centre, read_rgb
from fastokd.data.disk.manifest import read_manifest
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.prepared import pick_loader
from fastokd.data.disk.split import DiskSplit
from fastokd.data.disk.workers import _Chunk, make
from fastokd.data.views import View
from fastokd.errors import DataFileError, UserError
from tests.data.mutate import mutated

BATCH = 16


def originals() -> list[tuple[str, bytes]]:
    """Small images of every kind that data sets have."""
    pixels = np.random.default_rng(0).integers(256, size=(24, 30, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    made = []
    for suffix, mode, options in (
        ("jpg", "RGB", {}),
        ("jpg", "RGB", {"progressive": True}),
        ("jpg", "L", {}),
        ("jpg", "CMYK", {}),
        ("jpg", "RGB", {"subsampling": 2, "restart_marker_blocks": 2}),
        ("png", "RGB", {}),
        ("png", "P", {}),
    ):
        file = io.BytesIO()
        colour.convert(mode).save(file, "JPEG" if suffix == "jpg" else "PNG", **options)
        made.append((suffix, file.getvalue()))
    return made


def by_torchvision(split: DiskSplit, index: int) -> bool:
    """As a worker decodes it."""
    found = make(split, _Chunk([index], [[(None, False)]]), torch.zeros(1, dtype=torch.int64))
    if isinstance(found, str):
        assert split.path(index).name in found, found
        return False
    assert found.shape == (1, 1, 16, 16, 3)
    return True


def by_pillow(split: DiskSplit, index: int) -> bool:
    """As an image folder in memory is read."""
    path = split.path(index)
    try:
        return centre(read_rgb(path), View(16)).shape == (16, 16, 3)
    except UserError as error:
        said = str(error)
    assert path.name in said, said
    return False


def by_stream(split: DiskSplit, first: int, count: int) -> int:
    """How many of these are decoded; those of a batch that stops are tried in halves."""
    part = split.select(torch.arange(first, first + count))
    try:
        for images_BHWC, _ in stream_of(part, count).batches(0):
            assert images_BHWC.shape == (count, 16, 16, 3)
        return count
    except DataFileError as error:
        said = str(error)
    assert any(part.path(index).name in said for index in range(count)), said
    if count == 1:
        return 0
    half = count // 2
    return by_stream(split, first, half) + by_stream(split, first + half, count - half)


def decode_all(split: DiskSplit) -> dict[str, int]:
    """How many of a split each decoder takes."""
    found = {"pillow": 0, "torchvision": 0, "nvjpeg": 0, "dali": 0}
    for index in range(len(split)):
        found["pillow"] += by_pillow(split, index)
        found["torchvision"] += by_torchvision(split, index)
    for loader in {"nvjpeg", pick_loader("auto")[0]} - {"torchvision"}:
        for first in range(0, len(split), BATCH):
            part = replace(split, loader=loader)
            found[loader] += by_stream(part, first, min(BATCH, len(split) - first))
    return found


def main() -> None:
    root, count, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    warnings.simplefilter("ignore")  # Pillow's, about tags and sizes
    kinds = originals()
    for split, damaged in (("train", True), ("val", False)):
        for number in range(count if damaged else max(20, count // 10)):
            suffix, data = kinds[number % len(kinds)]
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            made = mutated(data, draw) if damaged else data
            (folder / f"{number}.{suffix}").write_bytes(made)
    manifest = prepare(root, quiet=True, workers=1).manifest
    assert read_manifest(root) == manifest

    def of(name: str) -> DiskSplit:
        return DiskSplit.of(manifest.usable(name), root, View(16), pick_loader("auto")[0], 1)

    found = {
        "quarantined": len(manifest.quarantined("train")),
        "usable": len(of("train")),
        **decode_all(of("train")),
    }
    # After it was looked at, in the same number of bytes.
    val = of("val")
    for index in range(len(val)):
        path = val.path(index)
        path.write_bytes(mutated(path.read_bytes(), draw, same_size=True))
    found |= {f"{name} later": number for name, number in decode_all(val).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
