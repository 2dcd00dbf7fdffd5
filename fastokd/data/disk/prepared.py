"""Data sets streamed from a prepared folder: ImageNet, and any folder of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastokd.data.disk import dali, nvjpeg
from fastokd.data.disk.layout import NO_TEST, held_out_folders, is_unsplit, shortened
from fastokd.data.disk.left_out import Seen, refuse_damage, what_is_left_out
from fastokd.data.disk.manifest import Entry, Manifest, read_manifest
from fastokd.data.disk.outgrown import refuse_outgrown
from fastokd.data.disk.scan import scan
from fastokd.data.disk.split import DiskSplit
from fastokd.data.preprocessing import Preprocessing
from fastokd.data.sets import files
from fastokd.data.splits import DatasetSplits
from fastokd.errors import UserError, warn
from fastokd.known import LOADERS

OLD = "the manifest is of an earlier fastokd, so headers are read: run `fastokd prepare` again"
CPU = torch.device("cpu")
# How to do without a loader that isn't available.
INSTEAD = {
    "dali": "",
    "nvjpeg": ": install torchvision's wheel for CUDA, or begin a run with --loader torchvision",
}


def pick_loader(
    name: str, device: torch.device = CPU, *, has_jpegs: bool = True
) -> tuple[str, str]:
    """The loader, and why it isn't a faster one ("" if nothing needs to be said).

    ``"auto"`` is DALI where it is installed, else nvJPEG where most files are JPEGs (``has_jpegs``) and
    ``device`` is a GPU on which it decodes an image, else torchvision.

    Raises:
        UserError: an unknown loader, or one that isn't available (the message says why).
    """
    if name not in LOADERS:
        raise UserError(f"loader is {name!r}: choose {', '.join(LOADERS)}")
    if name == "torchvision":
        return name, ""
    why = nvjpeg.why_not(device) if name == "nvjpeg" else dali.why_not()
    if why is None:
        return "nvjpeg" if name == "nvjpeg" else "dali", ""
    if name != "auto":
        raise UserError(f"loader is {name!r}, which isn't available: {why}{INSTEAD[name]}")
    if device.type != "cuda":
        return "torchvision", ""
    why_not_either = nvjpeg.why_not(device) if has_jpegs else "most files aren't JPEGs"
    if why_not_either is None:
        return "nvjpeg", f"DALI isn't available ({why})"
    return "torchvision", f"neither DALI ({why}) nor nvJPEG ({why_not_either}) is available"


def load_prepared(
    name: str,
    root: Path | None,
    shown: Preprocessing,
    *,
    loader: str = "auto",
    workers: int = 0,
    begun: bool = False,
    device: torch.device = CPU,
    own_test: bool = True,
) -> DatasetSplits:
    """A folder prepared by ``fastokd prepare``, streamed from disk.

    Args:
        shown: the preprocessing. Mean and deviation are replaced by measured ones, but for ImageNet.
        begun: for a resumed run: changes in the folder give a warning, not an error.
        device: where the batches will be used; ``"auto"`` depends on it.
        own_test: False if a test split will be drawn from train, so that ``val/`` is no test split.

    Raises:
        UserError: the folder isn't prepared or has changed since; there are no images to train or
            to test on; too many files are damaged (:func:`refuse_damage`); the loader isn't available.
    """
    root = files.need_root(name, root)
    manifest = read_manifest(root)
    try:
        refuse_outgrown(manifest, root)
    except UserError as error:
        if not begun:
            raise
        warn(f"{error}; the run continues with the images that it began with")
    manifest = _with_headers(manifest)
    usable = [entry for entry in manifest.entries if not entry.fault]
    jpegs = sum(map(_is_jpeg, usable))
    picked, why = pick_loader(loader, device, has_jpegs=2 * jpegs >= len(usable))
    published = name == "imagenet"  # mean and deviation
    there = {entry.split for entry in manifest.entries}
    folders = {"train": "train", **held_out_folders(name, there, own_test=own_test)}
    splits, seen = {}, []
    for split, folder in folders.items():
        here = seen_in(manifest, folder)
        seen += here
        if not begun:
            refuse_damage(folder_of(manifest, folder), manifest.classes, here)
        entries = manifest.usable(folder)
        if entries:
            counted = split == "train" and not published
            splits[split] = DiskSplit.of(
                entries, manifest.root, shown.view, picked, workers, counted=counted
            )
        elif split != "val":
            raise UserError(
                f"no image in {folder_of(manifest, folder)} can be used: prepare it again"
            )
    nothing = splits["train"].select(torch.empty(0, dtype=torch.int64))
    return DatasetSplits(
        name=name,
        class_names=manifest.classes,
        preprocessing=(
            shown if published else replace(shown, mean=manifest.mean, std=manifest.std)
        ),
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test", nothing),
        note=_note(manifest, picked, why, device, folders, seen),
        loader=picked,
        left_out=tuple((file.path, file.fault) for file in seen if file.fault),
    )


def folder_of(manifest: Manifest, split: str) -> Path:
    """The folder that holds a split's classes; the classes of an unsplit folder are train's."""
    unsplit = all(entry.split == "train" for entry in manifest.entries)
    return manifest.root if unsplit and is_unsplit(manifest.root) else manifest.root / split


def seen_in(manifest: Manifest, folder: str) -> list[Seen]:
    """Every file of one split's folder. ``fastokd prepare`` looks at files that aren't misplaced, and
    then knows their time; a manifest of an earlier version has no times."""
    timed = any(entry.mtime > 0 for entry in manifest.entries)
    return [
        Seen(entry.path, entry.label, entry.fault, entry.mtime > 0 if timed else entry.label >= 0)
        for entry in manifest.entries
        if entry.split == folder
    ]


def _with_headers(manifest: Manifest) -> Manifest:
    """Adds what a manifest of an earlier version lacks, read from the images' headers: the upright
    size, and which files are plain."""
    old = [i for i, e in enumerate(manifest.entries) if not e.fault and e.plain is None]
    if not old:
        return manifest
    entries = list(manifest.entries)
    looks = scan(manifest.root, [entries[i].path for i in old], pixels=False)
    for i, look in zip(old, looks, strict=True):
        # A file with a fault is kept, since a resumed run must have the same images; reading it raises.
        size = entries[i][3:5] if look.fault else look[:2]
        entries[i] = entries[i]._replace(height=size[0], width=size[1], plain=look.plain)
    return replace(manifest, entries=tuple(entries), notes=(*manifest.notes, OLD))


def _is_jpeg(entry: Entry) -> bool:
    return bool(entry.plain) and entry.path.lower().endswith((".jpg", ".jpeg"))


def _note(
    manifest: Manifest,
    loader: str,
    why: str,
    device: torch.device,
    folders: dict[str, str],
    seen: list[Seen],
) -> str:
    decoder = f"dali {dali.version()}" if loader == "dali" else loader
    if loader == "nvjpeg" and device.type == "cpu":
        decoder = "nvjpeg (by libjpeg, since the device is a CPU)"
    parts = [f"images are decoded by {decoder}{f', as {why}' if why else ''}"]
    used = [e for e in manifest.entries if e.split in folders.values() and not e.fault]
    odd = sum(not (_is_jpeg(e) if loader == "nvjpeg" else e.plain) for e in used)
    if odd and loader != "torchvision":
        others = "turned, transparent or rare" if loader == "dali" else "no plain JPEGs"
        parts.append(f"{odd:,} files that are {others} are decoded by Pillow")
    parts += [OLD] if OLD in manifest.notes else []
    if folders.get("test") == "val":
        parts.append(NO_TEST)
    notes = [note for note in manifest.notes if note != OLD]
    parts += [*shortened(notes), *filter(None, [what_is_left_out(seen)])]
    return "\n".join(parts)
