"""The picture files that a user names: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastokd.data.disk.walk import EXTENSIONS, is_image, list_folder
from fastokd.errors import UserError, as_path


def find_pictures(given: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that ``given`` names, in its order.

    A folder stands for the pictures in it and in its subfolders, by their extension, sorted by path;
    hidden names are left out, and a folder is walked once. A name that doesn't exist is a pattern, as
    the shell's (``**`` matches subfolders), whose matches are sorted. A file is taken with any
    extension.

    Raises:
        UserError: there is no such file, no match, or no picture in a folder.
    """
    return [path for name in given for path in _named(str(as_path("image", name)))]


def _named(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(_below(path, set()))
        if not found:
            raise UserError(
                f"{path} and its subfolders have no pictures: name a folder with files of the "
                f"extensions {', '.join(EXTENSIONS)}"
            )
        return found
    if path.is_file():
        return [path]
    if os.path.lexists(path) or not glob.has_magic(name):
        raise UserError(
            f"there is no picture {path}: name a file that Pillow reads, a folder, or a pattern "
            "such as 'pictures/*.jpg'"
        )
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    # `**` matches a folder and the files in it, too.
    files = [match for match in matches if not match.is_dir() and is_image(match.name)]
    files = files or [file for match in matches if match.is_dir() for file in _named(str(match))]
    if not files:
        raise UserError(f"no picture matches {name!r}: name a file, a folder or another pattern")
    return files


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    facts = os.stat(folder)
    if (facts.st_dev, facts.st_ino) in seen:
        return
    seen.add((facts.st_dev, facts.st_ino))
    for entry in list_folder(folder):
        if entry.hidden:
            continue
        if entry.kind == "folder":
            yield from _below(folder / entry.name, seen)
        elif entry.kind in ("file", "broken") and is_image(entry.name):
            yield folder / entry.name
