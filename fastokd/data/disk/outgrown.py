"""Checks whether a folder has changed since ``fastokd prepare``.

A run checks the modification time of each folder, and the size and time of up to ``CHECKED`` files,
evenly spaced. Folders are listed again only if one has changed. In a copied set all times are new;
there only names and sizes are compared. The loaders check the size of every file that they read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fastokd.data.disk.layout import find_layout
from fastokd.data.disk.manifest import Entry, Manifest
from fastokd.data.waits import by_threads
from fastokd.errors import UserError

CHECKED = 20_000
# Names listed in a message.
NAMED = 2
THREADS = 8


def what_changed(manifest: Manifest) -> str:
    """What was added, removed or changed, in words; "" for nothing, and for a manifest of an earlier
    version, which has no times.

    Raises:
        UserError: as :func:`find_layout`.
    """
    if not manifest.folders:
        return ""
    root = manifest.root
    moved = {path for path, time in manifest.folders.items() if _time(root / path) != time}
    moved |= {
        split
        for split in ("train", "val", "test")
        if split not in manifest.folders and (root / split).is_dir()
    }
    found = _names(manifest) if moved else []
    gone, changed = _files(manifest, moved)
    if not found and gone:
        found.append(_counted(gone, "file is gone", "files are gone"))
    if changed:
        found.append(_counted(changed, "file has changed", "files have changed"))
    return ", ".join(found)


def _names(manifest: Manifest) -> list[str]:
    """Classes and files that were added or removed."""
    layout = find_layout(manifest.root, labelled=False)
    here, there = {path for _, path, _ in layout.files}, {entry.path for entry in manifest.entries}
    now, then = set(layout.classes), set(manifest.classes)
    parts = [
        _counted(sorted(now - then), "class was added", "classes were added"),
        _counted(sorted(then - now), "class is gone", "classes are gone"),
        _counted(sorted(here - there), "file was added", "files were added"),
        _counted(sorted(there - here), "file is gone", "files are gone"),
    ]
    return [part for part in parts if part]


def _files(manifest: Manifest, moved: set[str]) -> tuple[list[str], list[str]]:
    """The checked files that are gone, and those that have changed."""
    known = [entry for entry in manifest.entries if entry.mtime]
    checked = known[:: max(1, -(-len(known) // CHECKED))]
    gone: list[str] = []
    changed: list[str] = []
    touched: dict[str, int] = {}
    for entry, facts in zip(checked, _stats(manifest.root, checked), strict=True):
        if facts is None:
            gone.append(entry.path)
        elif facts.st_size != entry.bytes:
            changed.append(entry.path)
        elif facts.st_mtime_ns != entry.mtime:
            touched[entry.path] = facts.st_mtime_ns
    copied = (
        len(touched) + len(changed) + len(gone) == len(checked)
        and {os.path.dirname(path) for path in touched} <= moved
        # Exchanged folders have each other's times.
        and {entry.mtime for entry in checked}.isdisjoint(touched.values())
    )
    return gone, changed if copied else sorted([*changed, *touched])


def _stats(root: Path, entries: list[Entry]) -> Iterable[os.stat_result | None]:
    def look(some: list[Entry]) -> list[os.stat_result | None]:
        return [_stat(root / entry.path) for entry in some]

    chunks = [entries[first : first + 256] for first in range(0, len(entries), 256)]
    for found in by_threads(look, chunks, THREADS, lambda some: some[0].path):
        yield from found


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _time(folder: Path) -> int:
    facts = _stat(folder)
    return 0 if facts is None else facts.st_mtime_ns


def _counted(names: list[str], one: str, more: str) -> str:
    if not names:
        return ""
    named = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names):,} {one if len(names) == 1 else more} ({named})"


def refuse_outgrown(manifest: Manifest, folder: Path) -> None:
    """Raises a :class:`UserError` that names what changed since the manifest in ``folder`` was made."""
    prepare = f"fastokd prepare {manifest.root}"
    if manifest.root.resolve() != folder.resolve():
        prepare += f" --out {folder}"
    try:
        changed = what_changed(manifest)
    except UserError as error:
        changed = str(error)
    if changed:
        raise UserError(
            f"{manifest.root} has changed since it was prepared: {changed}; run `{prepare}` again, or "
            "undo the change"
        )
