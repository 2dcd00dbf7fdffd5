"""``fastokd prepare``: decodes every image of a folder once and writes its manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastokd.data.disk.layout import (
    SPLITS,
    Layout,
    find_layout,
    refuse_unusable_classes,
)
from fastokd.data.disk.left_out import too_many
from fastokd.data.disk.manifest import Entry, Manifest, write_manifest
from fastokd.data.disk.prepared import folder_of, seen_in
from fastokd.data.disk.scan import SAMPLED, scan, statistics_of
from fastokd.errors import UserError
from fastokd.host.console import console

IMAGENET_CLASSES = 1000
# The most faults printed; the manifest has all.
SHOWN = 20


@dataclass(frozen=True)
class Prepared:
    """A manifest and the path where it was written."""

    path: Path
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        """The facts, with every quarantined file."""
        found = self.manifest
        counts = Counter(entry.split for entry in found.entries if not entry.fault)
        return {
            "manifest": str(self.path),
            "classes": len(found.classes),
            "images": {split: counts[split] for split in ("train", "val", "test")},
            "mean": list(found.mean),
            "std": list(found.std),
            "quarantined": [{"path": e.path, "fault": e.fault} for e in found.quarantined()],
            "notes": list(found.notes),
        }

    def lines(self) -> list[str]:
        """The facts as text."""
        facts = self.to_json()
        images = ", ".join(f"{count:,} {split}" for split, count in facts["images"].items())
        lines = [
            f"{facts['classes']:,} classes; images: {images}",
            f"mean {_rounded(self.manifest.mean)}, deviation {_rounded(self.manifest.std)}",
            *facts["notes"],
        ]
        for split in SPLITS:
            refusal = too_many(folder_of(self.manifest, split), seen_in(self.manifest, split))
            lines += [refusal] if refusal else []
        if not any(entry.split in SPLITS[1:] for entry in self.manifest.entries):
            lines.append("no val/ or test/ folder: a run splits the images (--val 0.1 --test 0.1)")
        quarantined = facts["quarantined"]
        if quarantined:
            files = "file" if len(quarantined) == 1 else "files"
            lines.append(f"quarantined, {len(quarantined):,} {files} that no run will read:")
            lines += [f"  {file['path']}: {file['fault']}" for file in quarantined[:SHOWN]]
            if len(quarantined) > SHOWN:
                lines.append(f"  and {len(quarantined) - SHOWN:,} more; the manifest lists them")
        return [*lines, f"written to {self.path}"]


def prepare(
    root: Path,
    *,
    ground_truth: Path | None = None,
    out: Path | None = None,
    imagenet: bool = False,
    workers: int = 0,
    quiet: bool = False,
) -> Prepared:
    """Scans ``root`` in parallel and writes ``manifest.jsonl``.

    Args:
        root: the folder that holds ``train/`` and ``val/`` or ``test/``, or a folder for each class.
        ground_truth: the classes of ILSVRC's flat ``val/``. Default: searched for.
        out: the folder of the manifest, if ``root`` can't be written. Default: ``root``.
        imagenet: adds a note if there aren't 1,000 classes.
        workers: threads; 0 for one a core.
        quiet: no progress bar.

    Raises:
        UserError: as :func:`find_layout`, all images of a class are damaged, or ``imagenet`` has no
            ``val/``. A set with many damaged files is only noted: a run refuses it.
    """
    if workers < 0:
        raise UserError(f"workers is {workers}: it must be at least 0")
    for place in () if out is None else (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file: give a folder for the manifest with --out")
    layout = find_layout(root, ground_truth)
    if imagenet and not any(split == "val" for split, _, _ in layout.files):
        raise UserError(f"{root} has no images in val/: ImageNet is tested on them, add them")
    if imagenet and len(layout.classes) != IMAGENET_CLASSES:
        layout.notes.append(f"ImageNet has 1,000 classes, this folder {len(layout.classes):,}")
    manifest = _scanned(root, layout, workers, quiet)
    train = [(entry.label, entry.fault) for entry in manifest.entries if entry.split == "train"]
    refuse_unusable_classes(folder_of(manifest, "train"), manifest.classes, train)
    return Prepared(write_manifest(manifest, out or root), manifest)


def _scanned(root: Path, layout: Layout, workers: int, quiet: bool) -> Manifest:
    good = [file for file in layout.files if file[1] not in layout.faults]
    train = [i for i, (split, _, _) in enumerate(good) if split == "train"]
    # Evenly spaced, so that all classes are sampled.
    take = np.linspace(0, len(train) - 1, min(SAMPLED, len(train))).round().astype(int)
    sampled = [train[i] for i in np.unique(take)]
    entries = [
        Entry(split, path, label, 0, 0, 0, layout.faults[path])
        for split, path, label in layout.files
        if path in layout.faults
    ]
    bar = Progress(
        TextColumn("looking at"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=quiet,
    )
    with bar:
        task = bar.add_task("", total=len(good))
        looks = scan(
            root,
            [path for _, path, _ in good],
            sampled=sampled,
            workers=workers,
            step=lambda files: bar.advance(task, files),
        )
        for (split, path, label), look in zip(good, looks, strict=True):
            entries.append(Entry(split, path, label, **look._asdict()))
    sums = [entry.sums for entry in entries if entry.sums is not None]
    if not sums:
        raise UserError(f"no image in {root / 'train'} can be read: is the folder what it seems?")
    place = {path: i for i, (_, path, _) in enumerate(layout.files)}
    entries.sort(key=lambda entry: place[entry.path])
    classes, notes = tuple(layout.classes), tuple(layout.notes)
    statistics = statistics_of(np.array(sums))
    return Manifest(root, classes, *statistics, tuple(entries), notes, layout.folders)


def _rounded(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
