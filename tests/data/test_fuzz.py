"""Damaged data sets: every file is read as what it should be, or refused by its name.

Hundreds of each kind here, thousands as proofs; images are decoded in a process of its own, which
has to survive (``fuzz_images.py``).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastokd.data import load_dataset
from fastokd.errors import UserError
from tests.data.make import pack, write_cifar, write_fashion_mnist
from tests.data.mutate import mutated

ROOT = Path(__file__).parents[2]


def _cifar(root: Path) -> list[Path]:
    return sorted(write_cifar(root, "cifar100", train=4, test=2).iterdir())


def _archive(root: Path) -> list[Path]:
    folder = write_cifar(root / "unpacked", "cifar100", train=4, test=2)
    pack(folder, root / "cifar-100-python.tar.gz")
    return [root / "cifar-100-python.tar.gz"]


FORMATS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "cifar": ("cifar100", _cifar),
    "archive": ("cifar100", _archive),
    "idx": (
        "fashion_mnist",
        lambda root: sorted(write_fashion_mnist(root, train=3, test=2, compressed=False).iterdir()),
    ),
    "idx.gz": (
        "fashion_mnist",
        lambda root: sorted(write_fashion_mnist(root, train=3, test=2).iterdir()),
    ),
}


def fuzz(kind: str, count: int, root: Path, seed: int) -> tuple[int, int]:
    """How many damaged sets were read as sets, and how many refused by name."""
    name, write = FORMATS[kind]
    files = write(root)
    load_dataset(name, root)
    draw = random.Random(seed)
    read = refused = 0
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, draw))
        try:
            data = load_dataset(name, root)
            said = ""
        except UserError as error:
            said = str(error)
        path.write_bytes(whole)
        if said:
            # Where two files of a set disagree, either may be named.
            assert any(str(file.name).split(".")[0] in said for file in files), said
            assert "\n" not in said
            refused += 1
            continue
        C = len(data.class_names)
        for split in (data.train, data.test):
            assert split.images_NHWC.shape[1:] == (32, 32, 3)  # type: ignore[union-attr]
            assert len(split.images_NHWC) == len(split.labels_N)  # type: ignore[union-attr]
            assert 0 <= int(split.labels_N.min()) <= int(split.labels_N.max()) < C
        read += 1
    return read, refused


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    read, refused = fuzz(kind, 200, tmp_path, seed=0)
    assert refused > 20  # what was damaged wasn't all pixels
    assert read + refused == 200


@pytest.mark.proof
@pytest.mark.parametrize("kind", FORMATS)
def test_thousands_of_damaged_files(kind: str, tmp_path: Path) -> None:
    read, refused = fuzz(kind, 1500, tmp_path, seed=1)
    assert read + refused == 1500


def images(count: int, seed: int, folder: Path) -> dict[str, int]:
    """What ``fuzz_images`` counted; that it came to its end is the test."""
    command = [sys.executable, "-m", "tests.data.fuzz_images", str(folder), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def test_damaged_images_are_quarantined_or_refused_by_name(tmp_path: Path) -> None:
    found = images(40, 0, tmp_path)
    assert found["quarantined"] > 2
    assert found["usable"] > 5
    assert found["usable"] + found["quarantined"] == 40


@pytest.mark.proof
def test_hundreds_of_damaged_images(tmp_path: Path) -> None:
    found = images(400, 1, tmp_path)
    assert found["usable"] + found["quarantined"] == 400
