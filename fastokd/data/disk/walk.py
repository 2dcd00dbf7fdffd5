"""Finds the image files below folders. Each folder is walked once, links are followed, and hidden names
are left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fastokd.errors import UserError

# torchvision's ImageFolder has all but the last four, which are JPEGs and PNGs too.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe", ".mpo", ".apng"),
)
# Files of operating systems and programs, in lower case. Names that begin with a dot are hidden too.
HIDDEN = (
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "desktop.ini",
)


class Found(NamedTuple):
    """A file with an image's extension: its path from the root, and why it can't be used, or ""."""

    path: str
    fault: str


class Listed(NamedTuple):
    """One name in a folder. ``kind``: ``"folder"`` or ``"file"`` (links are resolved); ``"broken"``, a
    dangling link; ``"other"``, a pipe or a device, which could block a reader."""

    name: str
    kind: str
    link: bool
    hidden: bool


# Why a name with an image's extension can't be used, by kind.
_FAULTS = {"file": "", "broken": "a link that leads nowhere", "other": "no regular file"}


def is_image(name: str) -> bool:
    """Whether a file has an image's extension."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether a name doesn't belong to a data set."""
    return name.startswith(".") or name.lower() in HIDDEN


def list_folder(
    folder: Path | str, folders: dict[str, int] | None = None, root: Path | None = None
) -> list[Listed]:
    """The content of a folder, sorted by name. Adds its modification time to ``folders``, under its
    path from ``root``.

    Raises:
        UserError: it can't be listed.
    """
    try:
        if folders is not None and root is not None:
            # Before the listing, so that files added meanwhile are detected later.
            folders[below_root(str(folder), root)] = os.stat(folder).st_mtime_ns
        with os.scandir(folder) as found:
            return sorted(_listed(entry) for entry in found)
    except OSError as error:
        raise UserError(
            f"can't list {folder} ({error.strerror or error}): make it readable, or move it away"
        ) from error


def _listed(entry: os.DirEntry[str]) -> Listed:
    link = entry.is_symlink()
    try:
        if entry.is_dir():
            kind = "folder"
        elif entry.is_file():
            kind = "file"
        else:
            kind = "broken" if link and not os.path.exists(entry.path) else "other"
    except OSError:  # a link to itself, or through a folder that can't be entered
        kind = "broken"
    return Listed(entry.name, kind, link, is_hidden(entry.name))


def images_in(folder: Path, root: Path) -> list[Found]:
    """The image files directly in a folder."""
    return [
        Found(below_root(str(folder / entry.name), root), _FAULTS[entry.kind])
        for entry in list_folder(folder)
        if entry.kind in _FAULTS and not entry.hidden and is_image(entry.name)
    ]


def below_root(path: str, root: Path) -> str:
    """``path`` relative to ``root``, with which it begins."""
    return path if str(root) == "." else path[len(f"{root}/".replace("//", "/")) :]


def walk_classes(
    root: Path, split: str, names: list[str], folders: dict[str, int], notes: list[str]
) -> dict[str, list[Found]]:
    """The image files of each class of one split, in torchvision's order: by folder, then by name.

    Links are followed, but no folder is walked twice in a split. A link to a folder that was walked, or
    to one that contains the split, gives a note. A class's own folder takes precedence over links to it.

    Args:
        split: the folder of the classes, "" for ``root``.
        names: the class folders.
        folders, notes: those of :class:`fastokd.data.disk.layout.Layout`, which are extended.
    """
    top = root / split
    walk = _Walk(root, folders, notes)
    for above in (top.resolve(), *top.resolve().parents):
        walk.first_time(str(above))
    real = [name for name in names if not (top / name).is_symlink()]
    for name in real:
        walk.first_time(str(top / name))
        walk.below(name, str(top / name), linked=False)
    # Mark all before walking one: a class that another class links to belongs to itself.
    linked = [n for n in names if n not in real and walk.follows(str(top / n))]
    for name in linked:
        walk.below(name, str(top / name), linked=True)
    while walk.links:
        links, walk.links = sorted(walk.links), []
        for path, name in links:
            if walk.follows(path):
                walk.below(name, path, linked=True)
    if walk.others:
        are = "file is" if len(walk.others) == 1 else "files are"
        notes.append(
            f"{split or root}/: {len(walk.others):,} {are} left out, since they have none of the extensions "
            f"{', '.join(EXTENSIONS)} (the first: {min(walk.others)})"
        )
    return {name: [found for _, found in sorted(walk.found.get(name, []))] for name in names}


class _Walk:
    """Folders visited, and the images found by class, with their folder and name as sort keys."""

    def __init__(self, root: Path, folders: dict[str, int], notes: list[str]) -> None:
        self.root, self.folders, self.notes = root, folders, notes
        self.seen: set[tuple[int, int]] = set()
        self.links: list[tuple[str, str]] = []
        self.others: list[str] = []
        self.found: dict[str, list[tuple[tuple[str, str], Found]]] = {}

    def first_time(self, folder: str) -> bool:
        """Marks a folder as walked; returns whether it was new."""
        try:
            facts = os.stat(folder)
        except OSError:  # listing it raises
            return True
        identity = facts.st_dev, facts.st_ino
        if identity in self.seen:
            return False
        self.seen.add(identity)
        return True

    def follows(self, link: str) -> bool:
        """Whether a link to a folder is walked; adds a note if not."""
        if self.first_time(link):
            return True
        self.notes.append(
            f"{below_root(link, self.root)} is a link to a folder that is read already: it isn't followed"
        )
        return False

    def below(self, name: str, top: str, *, linked: bool) -> None:
        """Adds everything in ``top`` to class ``name``; links to folders are queued."""
        stack = [top]
        images = self.found.setdefault(name, [])
        while stack:
            folder = stack.pop()
            for entry in list_folder(folder, self.folders, self.root):
                path = f"{folder}/{entry.name}"
                if entry.hidden:
                    continue
                if entry.kind == "folder" and entry.link:
                    self.links.append((path, name))
                elif entry.kind == "folder":
                    # Without links a folder can't be reached twice.
                    if self.first_time(path) or not linked:
                        stack.append(path)
                elif is_image(entry.name):
                    found = Found(below_root(path, self.root), _FAULTS[entry.kind])
                    images.append(((folder, entry.name), found))
                elif entry.kind == "broken":
                    self.notes.append(f"{below_root(path, self.root)} is a link that leads nowhere")
                else:
                    self.others.append(below_root(path, self.root))
