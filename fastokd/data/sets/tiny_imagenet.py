"""Tiny-ImageNet from its own layout, decoded once into memory."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastokd.data.disk.layout import Layout
from fastokd.data.disk.walk import Found, images_in, list_folder
from fastokd.data.preprocessing import Preprocessing
from fastokd.data.sets import files
from fastokd.data.sets.folder import load_layout
from fastokd.data.splits import DatasetSplits
from fastokd.errors import UserError

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
# As many public loaders have it; torchvision has no loader of this set.
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
AGAIN = f"remove {FOLDER} and unpack {ARCHIVE} again, or fetch it (--download)"


def load_tiny_imagenet(
    root: Path | None,
    shown: Preprocessing,
    *,
    download: bool,
    begun: bool = False,
    kept: Mapping[str, Any] | None = None,
) -> DatasetSplits:
    """Tiny-ImageNet from ``root/tiny-imagenet-200`` or ``root``: ``train/ID/images/*`` to train on, and
    ``val/images/*`` to test on, whose classes ``val/val_annotations.txt`` has. Its own ``test/`` has no
    labels and isn't read.

    Class ids follow the sorted WordNet ids, as for ``ImageFolder``; the names are those of ``words.txt``.
    Damaged files are left out. ``begun`` and ``kept`` are :func:`fastokd.data.sets.folder.load_folder`'s.

    Raises:
        UserError: files are missing or damaged, or annotations don't fit the images.
    """
    root = files.need_root("tiny_imagenet", root)
    folder = _find(root, download)
    layout = find_layout(folder)
    ids = layout.classes
    splits = load_layout(
        folder,
        layout,
        {"train": "train", "test": "val"},
        shown,
        name="tiny_imagenet",
        begun=begun,
        kept=kept,
    )
    return replace(splits, class_names=_names(folder / "words.txt", ids))


def _find(root: Path, download: bool) -> Path:
    """The folder that holds ``train/`` and ``val/``."""
    for folder in (root / FOLDER, root):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder
    archive = root / ARCHIVE
    if download and (root / FOLDER).exists():
        raise UserError(
            f"{root / FOLDER} lacks train/ or val/: remove it, and --download fetches it again"
        )
    if download:
        files.download("tiny_imagenet", URL, root, MD5)
        _unpack(archive, root)
        return root / FOLDER
    if archive.is_file():
        raise UserError(f"{archive} is packed: unpack it there, or give --download to do so")
    raise UserError(
        f"no tiny_imagenet in {root}: there is no {FOLDER}/ with train/ and val/; give --data-root DIR, or "
        "--download to fetch it there"
    )


def _unpack(archive: Path, root: Path) -> None:
    """Unpacks beside the folder and renames it, so that an interrupted program leaves no half of it."""
    # zipfile drops absolute paths and "..", so that no member leaves root.
    try:
        with (
            zipfile.ZipFile(archive) as packed,
            tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as apart,
        ):
            packed.extractall(apart)
            os.replace(Path(apart) / FOLDER, root / FOLDER)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"can't unpack {archive} into {root} ({error}): make room there, or fetch it again"
        ) from error


def find_layout(folder: Path) -> Layout:
    """The images of ``train/`` and ``val/``, and their classes, which are WordNet ids.

    Raises:
        UserError: a folder or the annotations are missing, or name a class that train lacks.
    """
    layout = Layout()
    train = folder / "train"
    for entry in list_folder(train):
        if entry.kind != "folder" or entry.hidden:
            continue
        label = len(layout.classes)
        layout.classes.append(entry.name)
        for image in _images(train / entry.name / "images", folder):
            _add(layout, "train", image, label)
    if len(layout.classes) < 2:
        raise UserError(f"{train} has {len(layout.classes)} classes: {AGAIN}")
    images, path = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    if not images.is_dir():
        raise UserError(
            f"there is no folder {images}: {AGAIN}; with a folder for each class in val/, train on it as "
            "imagefolder"
        )
    truth = _truth(path, {name: label for label, name in enumerate(layout.classes)})
    found = {Path(image.path).name: image for image in _images(images, folder)}
    missing = next((name for name in truth if name not in found), None)
    if missing is not None:
        raise UserError(f"{path} names {missing}, which isn't in {images}: {AGAIN}")
    for name, image in found.items():
        if name not in truth:
            raise UserError(f"{path} has no class for {name}: {AGAIN}")
        _add(layout, "val", image, truth[name])
    return layout


def _images(folder: Path, root: Path) -> list[Found]:
    """The images of a folder that must have some."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: {AGAIN}")
    found = images_in(folder, root)
    if not found:
        raise UserError(f"{folder} has no images: {AGAIN}")
    return found


def _add(layout: Layout, split: str, image: Found, label: int) -> None:
    layout.files.append((split, image.path, label))
    if image.fault:
        layout.faults[image.path] = image.fault


def _truth(path: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """The class id of each file: lines of name, class and a box that isn't used."""
    truth = {}
    for number, line in enumerate(_lines(path), 1):
        name, _, rest = line.partition("\t")
        known = rest.split("\t")[0]
        if known not in ids:
            raise UserError(
                f"line {number} of {path} has the class {known!r}, which train/ lacks: {AGAIN}"
            )
        truth[name] = ids[known]
    return truth


def _names(path: Path, ids: list[str]) -> tuple[str, ...]:
    """The first word of each class; a word of two classes gets the id behind it."""
    words = {}
    for line in _lines(path):
        name, _, rest = line.partition("\t")
        words[name] = rest.split(",")[0].strip()
    unnamed = next((name for name in ids if not words.get(name)), None)
    if unnamed is not None:
        raise UserError(f"{path} has no name of {unnamed}: {AGAIN}")
    firsts = [words[name] for name in ids]
    return tuple(
        word if firsts.count(word) == 1 else f"{word} ({name})"
        for name, word in zip(ids, firsts, strict=True)
    )


def _lines(path: Path) -> list[str]:
    """The lines that aren't empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} ({error}): {AGAIN}") from error
    return [line for line in text.splitlines() if line.strip()]
