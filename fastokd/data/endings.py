"""Which files of a folder are taken for pictures: by their endings, and what that leaves out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

# torchvision's ImageFolder has all but the last four, which are JPEGs and PNGs too.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe", ".mpo", ".apng"),
)


def is_image(name: str) -> bool:
    """Whether a file counts as an image: by its ending, as torchvision has it."""
    return name.lower().endswith(EXTENSIONS)


def left_out(root: Path, folders: Iterable[Path]) -> str:
    """A sentence that names the files below ``folders`` that no ending makes images; "" for none.

    Hidden files, which editors and file managers leave, aren't counted.
    """
    others = [
        Path(parent, name)
        for folder in folders
        for parent, _, names in sorted(os.walk(folder))
        for name in sorted(names)
        if not is_image(name) and not name.startswith(".")
    ]
    if not others:
        return ""
    first = others[0].relative_to(root).as_posix()
    return (
        f"{len(others):,} files are left out, as none of the endings {', '.join(EXTENSIONS)} "
        f"is theirs (the first: {first})"
    )
