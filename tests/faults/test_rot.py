"""Whatever of a checkpoint is cut off or turned over, it is never loaded: the one before is.

The whole of it, every length of 64 KB and a thousand of each kind on a real checkpoint, is a proof.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fastokd.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions

FILES = ("state.safetensors", "state.json", "manifest.json")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two checkpoints, the newer one of 64 KB."""
    save_checkpoint(tmp_path / "last-000000001", {"x": torch.ones(3)}, {"step": 1})
    save_checkpoint(
        tmp_path / "last-000000002", {"x": torch.randn(16_000)}, {"step": 2, "how": "é" * 40}
    )
    return tmp_path / "last-000000002"


@pytest.fixture(scope="module")
def real_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of OKDDip's writes, and its copy under the number before."""
    small = recipe("okddip-branch/resnet8/digits", students=2, batch_size=50, ema=0.9)
    options = RunOptions(engine="loop", precision="fp32", device="cpu")
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "last-000000002", *build(small, options).state())
    shutil.copytree(folder / "last-000000002", folder / "last-000000001")
    return folder / "last-000000002"


def must_fall_back(checkpoint: Path, name: str) -> None:
    """It isn't loaded, its file is named, and the one before is taken."""
    with pytest.raises(UserError) as refused:
        load_checkpoint(checkpoint)
    assert checkpoint.name in str(refused.value)
    path, _, _, faults = newest_checkpoint(checkpoint.parent)
    assert path.name == "last-000000001"
    assert faults == [str(refused.value)]
    if "damaged" in faults[0] and name != "manifest.json":
        assert name in faults[0]


def refuses(checkpoint: Path) -> bool:
    try:
        load_checkpoint(checkpoint)
    except UserError:
        return True
    return False


def cut(checkpoint: Path, name: str, sizes: Iterable[int]) -> list[int]:
    """The lengths, from the largest on, at which the file was taken for whole; it is put back."""
    path = checkpoint / name
    whole = path.read_bytes()
    survived = []
    try:
        for size in sorted(sizes, reverse=True):
            os.truncate(path, size)
            if not refuses(checkpoint):
                survived.append(size)
    finally:
        path.write_bytes(whole)
    assert not refuses(checkpoint)
    return survived


def flip(checkpoint: Path, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Single bits, anywhere in the folder's files in turn, that were not noticed."""
    draw = random.Random(seed)
    unnoticed = []
    for number in range(count):
        name = FILES[number % len(FILES)]
        path = checkpoint / name
        at, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        with open(path, "r+b") as file:
            file.seek(at)
            before = file.read(1)
            file.seek(at)
            file.write(bytes([before[0] ^ 1 << bit]))
            file.flush()
            if not refuses(checkpoint):
                unnoticed.append((name, at, bit))
            file.seek(at)
            file.write(before)
    assert not refuses(checkpoint)
    return unnoticed


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_noticed(small: Path, name: str) -> None:
    size = (small / name).stat().st_size
    sizes = {*range(0, size, 211), *range(min(size, 64)), *range(max(0, size - 64), size)}
    assert cut(small, name, sizes) == []
    os.truncate(small / name, size - 1)
    must_fall_back(small, name)


def test_a_flipped_bit_is_noticed(small: Path) -> None:
    assert flip(small, 300, seed=0) == []
    for name in FILES:
        path = small / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        must_fall_back(small, name)
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def test_of_a_real_checkpoint_too(real_one: Path) -> None:
    draw = random.Random(1)
    for name in FILES:
        size = (real_one / name).stat().st_size
        assert cut(real_one, name, [draw.randrange(size) for _ in range(20)]) == []
    assert flip(real_one, 60, seed=1) == []


@pytest.mark.proof
def test_every_length_of_64_kilobytes(small: Path) -> None:
    sizes = {name: (small / name).stat().st_size for name in FILES}
    assert sizes["state.safetensors"] > 64_000
    for name, size in sizes.items():
        assert cut(small, name, range(size)) == []


@pytest.mark.proof
def test_a_thousand_cuts_and_a_thousand_bits_of_a_real_checkpoint(real_one: Path) -> None:
    draw = random.Random(2)
    for name in FILES:
        size = (real_one / name).stat().st_size
        assert cut(real_one, name, [draw.randrange(size) for _ in range(334)]) == []
    assert flip(real_one, 1000, seed=2) == []
