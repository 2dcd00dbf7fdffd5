"""Images a second: fastokd's loaders against torchvision's on photographs, memory against it on CIFAR.

    python -m bench.bench_loader --cores 2
    python -m bench.bench_loader --cores 16 --device cuda    # with nvJPEG, and DALI on the GPU

The loaders run in turn, ``--rounds`` times, on the same files and cores. The first quarter of the
batches warms workers and caches and isn't counted. Two limits are measured as well: reading the files
alone, and decoding the JPEGs alone. A loader that decodes whole images on the CPU can't exceed them;
DALI decodes only the parts that random-resized crops need. A loader that isn't installed is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastokd.data import Augment, Split, load_dataset, stream_of
from fastokd.data.disk import dali, nvjpeg
from fastokd.data.disk.manifest import read_manifest
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import write_photographs
from fastokd.data.preprocessing import preprocessing_of
from fastokd.device import use_device
from fastokd.learner.allocator import keep_freed_memory

BATCH = 64
CIFAR_BATCH = 128
REPEATS = 6
# Names of rows that a ratio is taken of.
REFERENCE, BYTES = "torchvision's reference", "the same left as bytes"
DECODING = "decoding alone"
MEMORY, PAPERS = "CIFAR in memory", "CIFAR, torchvision"


def rate(batches: Iterable[Any], images: int) -> float:
    """Images a second after the first quarter of ``images``."""
    seen, began, first = 0, 0.0, 0
    for batch in batches:
        seen += len(batch[1])
        if not began and seen >= images // 4:
            began, first = time.perf_counter(), seen
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (seen - first) / (time.perf_counter() - began)


def ours(root: Path, loader: str, cores: int, device: torch.device) -> Callable[[], float]:
    """Our stream over a split whose files are repeated, its batches on ``device``."""
    data = load_dataset("imagenet", root, loader=loader, workers=cores, device=device)
    split = data.train.to(device)
    many = split.select(torch.arange(len(split)).repeat(REPEATS))
    stream = stream_of(many, BATCH, augment=Augment(0, resized_crop=True), shuffle=True)
    return lambda: rate(stream.batches(0), len(many))


def torchvisions(root: Path, cores: int, *, floats: bool) -> Callable[[], float]:
    """ImageFolder, RandomResizedCrop and flip; with ``floats`` also cast and normalised, as in
    torchvision's training reference."""
    steps: list[Any] = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    if floats:
        imagenet = preprocessing_of("imagenet")
        steps += [v2.ToDtype(torch.float, scale=True), v2.Normalize(imagenet.mean, imagenet.std)]
    see = v2.Compose(steps)
    folder = ImageFolder(root / "train", transform=see)
    many = Subset(folder, list(range(len(folder))) * REPEATS)
    loader = DataLoader(many, BATCH, shuffle=True, num_workers=cores)
    return lambda: rate(loader, len(many))


def alone(root: Path, cores: int, work: Callable[[Path], object]) -> Callable[[], float]:
    """``work`` on every file, by ``cores`` threads."""
    manifest = read_manifest(root)
    paths = [root / entry.path for entry in manifest.usable("train")] * REPEATS

    def measure() -> float:
        with ThreadPoolExecutor(cores) as pool:
            began = time.perf_counter()
            for _ in pool.map(work, paths, chunksize=BATCH):
                pass
            return len(paths) / (time.perf_counter() - began)

    return measure


def decoded(path: Path) -> None:
    """Decodes the whole image."""
    with Image.open(path) as image:
        image.load()


class Pictures(Dataset[Any]):
    """CIFAR as the papers' loops read it through torchvision: one PIL image at a time, cropped, flipped,
    cast and normalised."""

    def __init__(self, pixels_NHW3: np.ndarray) -> None:
        self.pixels = pixels_NHW3
        self.see = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float, scale=True),
                v2.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.see(Image.fromarray(self.pixels[index])), index % 10


def cifar(cores: int, device: torch.device) -> dict[str, Callable[[], float]]:
    """50,000 drawn images in memory; torchvision's loader takes 6,400 of them in a round."""
    images = torch.randint(256, (50_000, 32, 32, 3), dtype=torch.uint8)
    stream = stream_of(
        Split(images, torch.arange(50_000) % 10).to(device),
        CIFAR_BATCH,
        augment=Augment(4),
        shuffle=True,
    )
    few = Pictures(images[:6400].numpy())
    loader = DataLoader(few, CIFAR_BATCH, shuffle=True, num_workers=cores)
    return {
        MEMORY: lambda: rate(stream.batches(0), 50_000),
        PAPERS: lambda: rate(loader, len(few)),
    }


def measured(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The rates of each call, one in each round."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(call())
    return rates


def spread(figures: list[float]) -> dict[str, float]:
    """Median, lowest and highest of all rounds; a ratio is of two rates of one round."""
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def main() -> None:
    """Measures, prints a table, and writes it with ``--json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of the batches: cpu or cuda")
    parser.add_argument("--images", type=Path, help="photographs to use again, or to be made there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(args.cores)
    device = use_device(args.device)
    keep_freed_memory()  # as in every run on a CPU
    with tempfile.TemporaryDirectory() as folder:
        root = args.images or Path(folder) / "photographs"
        if not root.exists():
            write_photographs(root, classes=8, train=32, val=1, spread=0.0)
            prepare(root, quiet=True)
        why_not = {"dali": dali.why_not(), "nvjpeg": nvjpeg.why_not(device)}
        if device.type == "cpu":
            why_not["nvjpeg"] = "it is for a GPU: add --device cuda"
        calls = {
            loader: ours(root, loader, args.cores, device)
            for loader in ("dali", "nvjpeg", "torchvision")
            if why_not.get(loader) is None
        }
        calls |= {
            REFERENCE: torchvisions(root, args.cores, floats=True),
            BYTES: torchvisions(root, args.cores, floats=False),
            DECODING: alone(root, args.cores, decoded),
            "the disk alone (cached)": alone(root, args.cores, Path.read_bytes),
            **cifar(args.cores, device),
        }
        size = sum(f.stat().st_size for f in (root / "train").rglob("*.JPEG")) // 256
        rates = measured(calls, args.rounds)
    pairs = [
        *itertools.product(("dali", "nvjpeg"), (REFERENCE, BYTES, DECODING)),
        ("dali", "nvjpeg"),
        (MEMORY, PAPERS),
    ]
    rows = {name: spread(figures) for name, figures in rates.items()}
    ratios = {
        f"{x} / {y}": spread([a / b for a, b in zip(rates[x], rates[y], strict=True)])
        for x, y in pairs
        if x in rates and y in rates
    }
    how = f"measured-{'gpu' if device.type == 'cuda' else 'cpu'}, {args.cores} cores"
    print(f"{how:42}   median  (lowest to highest of {args.rounds} rounds)")
    for name, row in rows.items():
        print(
            f"{name:42} {row['median']:8,.0f}  ({row['low']:,.0f} to {row['high']:,.0f}) images/s"
        )
    for name, row in ratios.items():
        print(f"{name:42} {row['median']:8.2f}  ({row['low']:.2f} to {row['high']:.2f}) times")
    print(
        f"500x375 JPEGs of {size / 1024:.0f} KiB to 224x224, batches of {BATCH}; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}"
        + (f", DALI {dali.version()}" if "dali" in rates else "")
    )
    for loader, why in why_not.items():
        if why is not None:
            print(f"without {loader}: {why}")
    if args.json:
        args.json.write_text(json.dumps({"images_per_second": rows, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
