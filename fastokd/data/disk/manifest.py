"""The manifest that ``fastokd prepare`` writes: every file of a folder of images.

``manifest.jsonl`` is a header (a JSON object), then a JSON list a file:
``[split, path, class id, height, width, bytes, fault, plain, mtime, sums]``. Height and width are those
of the upright image. No run reads a file with a fault. All loaders decode files that aren't plain
(:func:`fastokd.data.decode.is_plain`) with Pillow.

Manifests of earlier versions lack the last three fields and the header's ``folders``. For them the
image headers are read, changes aren't detected, and mean and deviation include held-out images.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastokd.errors import UserError

MANIFEST = "manifest.jsonl"
VERSION = 1


class Entry(NamedTuple):
    """One file.

    ``path`` is relative to the root; ``label`` is -1 if unknown; ``fault`` is "" for a readable image;
    ``plain`` is None and ``mtime`` (ns) is 0 if unknown; ``sums``, of sampled images: the number of
    pixels, the sum of each channel, the sum of each channel's squares.
    """

    split: str
    path: str
    label: int
    height: int
    width: int
    bytes: int
    fault: str
    plain: bool | None = None
    mtime: int = 0
    sums: list[int] | None = None


@dataclass(frozen=True)
class Manifest:
    """A prepared folder.

    Attributes:
        root: the folder that paths are relative to.
        classes: names in torchvision's order, indexed by the entries' labels.
        mean, std: of the channels of train's images, in [0, 1].
        entries: all files, those with faults included, by split in torchvision's order.
        notes: problems of folders, such as one in the wrong place.
        folders: modification time (ns) of each folder by path; empty if unknown.
    """

    root: Path
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    folders: Mapping[str, int] = field(default_factory=dict)

    def usable(self, split: str) -> list[Entry]:
        """The readable images of one split."""
        return [entry for entry in self.entries if entry.split == split and not entry.fault]

    def quarantined(self, *splits: str) -> list[Entry]:
        """The files with a fault, of ``splits`` or of all."""
        return [e for e in self.entries if e.fault and (not splits or e.split in splits)]


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Writes ``folder/manifest.jsonl`` atomically; returns its path.

    Raises:
        UserError: the folder can't be written.
    """
    path = folder / MANIFEST
    header = {
        "fastokd_manifest": VERSION,
        # Relative, so that the folder can be moved.
        "root": "."
        if manifest.root.resolve() == folder.resolve()
        else str(manifest.root.resolve()),
        "files": len(manifest.entries),
        "classes": manifest.classes,
        "mean": manifest.mean,
        "std": manifest.std,
        "notes": manifest.notes,
        "folders": manifest.folders,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="ascii") as file:
            try:
                file.write(json.dumps(header) + "\n")
                file.writelines(json.dumps(_row(entry)) + "\n" for entry in manifest.entries)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(
            f"the manifest can't be written to {folder} ({error.strerror or error}): "
            "give a folder that can be with --out"
        ) from error
    return path


def _row(entry: Entry) -> tuple[Any, ...]:
    return entry if entry.sums is not None else entry[:-1]


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        with open(path, encoding="ascii") as file:
            header = json.loads(next(file, "null"))
            entries = tuple(Entry(*json.loads(line)) for line in file)
        return _checked(header, entries, folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} isn't prepared: run `fastokd prepare {folder}` once, which looks at every "
            "image"
        ) from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): make it again with `fastokd prepare`"
        ) from error


def _checked(header: Any, entries: tuple[Entry, ...], folder: Path) -> Manifest:
    if header["fastokd_manifest"] != VERSION:
        raise ValueError(f"version {header['fastokd_manifest']}, and this fastokd reads {VERSION}")
    if len(entries) != header["files"]:
        raise ValueError(f"{len(entries)} of {header['files']} files")
    classes = tuple(header["classes"])
    for entry in entries:
        if entry.path.startswith("/") or ".." in entry.path.split("/") or "\0" in entry.path:
            raise ValueError(f"the path {entry.path!r}, which leads out of the folder")
        known = 0 <= entry.label < len(classes)
        seen = known and min(entry.height, entry.width, entry.bytes) > 0 and _counts(entry.sums)
        if not entry.fault and not seen:
            raise ValueError(f"a line that can't be: {list(entry)}")
    mean, std = (tuple(float(value) for value in header[name]) for name in ("mean", "std"))
    folders = {str(path): int(time) for path, time in header.get("folders", {}).items()}
    notes = tuple(header["notes"])
    return Manifest((folder / header["root"]), classes, mean, std, entries, notes, folders)


def _counts(sums: Any) -> bool:
    """Whether these can be an image's sums."""
    return sums is None or (len(sums) == 7 and sums[0] > 0 and all(0 <= s < 1 << 62 for s in sums))
