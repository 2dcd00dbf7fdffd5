"""Finds run folders. Nothing here imports torch."""

from __future__ import annotations

import os
from pathlib import Path


def run_folders(top: Path, *, links: bool = True) -> list[Path]:
    """Run folders at or below ``top``, sorted, each once and without what lies in them.

    ``links``: symbolic links below ``top`` are followed.
    """
    found, seen = [], set()
    for path, below, files in os.walk(top, followlinks=links):
        real = os.path.realpath(path)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        if "recipe.json" in files and is_run(Path(path)):
            found.append(Path(path))
            below.clear()
        below.sort()
    return found


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run."""
    return (path / "recipe.json").is_file()
