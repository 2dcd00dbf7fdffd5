"""WebDataset's shards on disk: tar archives in which files of one name are one sample.

The library reads shards in sequence. Here the headers are read once, so that any image can be read alone
and batches are drawn as of every other set; the library isn't needed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastokd.data.disk.walk import EXTENSIONS
from fastokd.data.packed.listing import Packed, numbered
from fastokd.errors import UserError

CLASS_NAMES = "classnames.txt"
LABEL = ".cls"
SPLITS = ("train", "val", "valid", "validation", "test")


class _Sample(NamedTuple):
    """One sample of a shard: its name there, its class id, and its image's first byte and length."""

    name: str
    label: int
    first: int
    length: int


def list_wds(root: Path) -> tuple[dict[str, Packed], tuple[str, ...]]:
    """The images of each split and the names of the classes.

    The split of a shard is a word of its path below ``root``, such as ``train-000000.tar`` or
    ``val/000000.tar``; if no path has one, all are train's. A sample is an image and ``.cls``, a class id
    from 0 in text. ``classnames.txt`` may hold the names, one a line.

    Raises:
        UserError: there are no shards, some have no split's name or can't be read, or a sample has no
            image, several, or no class id.
    """
    shards = sorted(path for path in root.rglob("*.tar") if not path.is_dir())
    if not shards:
        packed = next(iter(root.rglob("*.tar.*")), None)
        raise UserError(
            f"{root} has no shards (*.tar): give the folder that holds them"
            if packed is None
            else f"{packed} is compressed, and images are read from plain .tar files: unpack it with gunzip"
        )
    words = {shard: _split_of(shard.relative_to(root)) for shard in shards}
    if any(words.values()):
        lone = next((shard for shard, word in words.items() if not word), None)
        if lone is not None:
            raise UserError(
                f"{lone} has no split in its name, which other shards have: rename it, for example to "
                f"train-{lone.name}"
            )
    found = {}
    for split in dict.fromkeys(words.values()):
        of_it = tuple(shard for shard in shards if words[shard] == split)
        found[split or "train"] = _packed(root, of_it)
    return found, _class_names(root, numbered(root, found))


def _split_of(path: Path) -> str:
    """The split that a shard's path names, or ""."""
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((word for word in words if word in SPLITS), "")


def _packed(root: Path, shards: tuple[Path, ...]) -> Packed:
    names, labels, places = [], [], []
    for number, shard in enumerate(shards):
        for sample in _samples(shard):
            names.append(f"{shard.relative_to(root)}/{sample.name}")
            labels.append(sample.label)
            places.append((number, sample.first, sample.length))
    place_N3 = np.array(places, np.int64).reshape(-1, 3)
    return Packed(shards, names, np.array(labels, np.int64), place_N3)


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of one shard, in order."""
    try:
        with tarfile.open(shard, "r:") as tar:
            images: dict[str, tarfile.TarInfo] = {}
            labels: dict[str, int] = {}
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not stem or not dot:
                    continue
                key, ending = f"{folder}/{stem}".lstrip("/"), f".{ending.lower()}"
                if ending in EXTENSIONS:
                    if key in images:
                        raise UserError(f"{shard} has two images called {key}: pack it again")
                    images[key] = member
                elif ending == LABEL:
                    labels[key] = _label(shard, key, tar, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard} is damaged ({error}): pack or fetch it again") from error
    odd = next(iter(images.keys() ^ labels.keys()), None)
    if odd is not None or not images:
        what = "no images" if odd is None else f"no {LABEL if odd in images else 'image'} of {odd}"
        raise UserError(f"{shard} has {what}: a sample is an image and its class id in {LABEL}")
    for key, member in images.items():
        yield _Sample(Path(member.name).name, labels[key], member.offset_data, member.size)


def _label(shard: Path, key: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = b"" if file is None else file.read(32).strip()
    if not text.isdigit() or len(text) > 9:
        raise UserError(
            f"{shard} has {text!r} as the class id of {key}: it must be a whole number from 0"
        )
    return int(text)


def _class_names(root: Path, ids: tuple[str, ...]) -> tuple[str, ...]:
    path = root / CLASS_NAMES
    if not path.is_file():
        return ids
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} ({error}): write one name a line in UTF-8") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < len(ids) or len({*names}) != len(names):
        raise UserError(
            f"{path} has {len({*names})} different names, and the shards have classes 0 to {ids[-1]}: give "
            "each its own line"
        )
    return names
