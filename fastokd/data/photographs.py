"""Folders of realistic JPEGs for tests and benchmarks, cut from the photographs that scikit-learn
ships: ``python -m fastokd.data.photographs DIR``."""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
GRAIN = 6.0


def photographs() -> list[Image.Image]:
    """scikit-learn's two photographs, 640x427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def crop(
    generator: np.random.Generator, photograph: Image.Image, size: tuple[int, int]
) -> Image.Image:
    """A random part of a photograph, at least 0.8 of the largest that fits, at ``size``."""
    width, height = photograph.size
    fit = min(width / size[0], height / size[1])
    scale = fit * generator.uniform(0.8, 1.0)
    w, h = (max(1, int(length * scale)) for length in size)
    left = int(generator.integers(width - w + 1))
    top = int(generator.integers(height - h + 1))
    box = (left, top, left + w, top + h)
    part = photograph.resize(size, Image.Resampling.BICUBIC, box=box)
    # Sensor noise, which makes the files nearly as large as ImageNet's.
    noise = generator.normal(0, GRAIN, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(part) + noise).clip(0, 255).astype(np.uint8))


def tint(image: Image.Image, share: float) -> Image.Image:
    """The image tinted with one hue, which distinguishes classes of the same photograph."""
    light = np.array(colorsys.hsv_to_rgb(share, 0.45, 1.0))
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


def write_photographs(
    root: Path,
    *,
    classes: int = 10,
    train: int = 20,
    val: int = 5,
    size: tuple[int, int] = (500, 375),
    spread: float = 0.2,
    quality: int = 95,
    seed: int = 0,
) -> Path:
    """``root/train/n000.../*.JPEG`` and ``root/val/...``; returns ``root``.

    Each class has one of the photographs in its own hue, so that it can be learnt. Images are a
    function of the arguments. Sides vary by up to ``spread`` around ``size`` (width, height).
    """
    generator = np.random.default_rng(seed)
    sources = photographs()
    for split, count in zip(SPLITS, (train, val), strict=True):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                sides = generator.uniform(1 - spread, 1 + spread, 2)
                shape = int(size[0] * sides[0]), int(size[1] * sides[1])
                image = crop(generator, sources[label % len(sources)], shape)
                tint(image, label / classes).save(
                    folder / f"{split}_{label:08d}_{index}.JPEG", quality=quality
                )
    return root


def main() -> None:
    """Runs :func:`write_photographs` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastokd.data.photographs")
    parser.add_argument("root", type=Path)
    for name, default in (("classes", 10), ("train", 20), ("val", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    write_photographs(
        args.root, classes=args.classes, train=args.train, val=args.val, seed=args.seed
    )
    print(f"{args.classes * (args.train + args.val)} images in {args.root}")


if __name__ == "__main__":
    main()
