"""Cache folders. If one can't be written, another is used; fastokd also runs without any.

:func:`cache_root` holds the built C++ ops and the timings of engines. :func:`settle` does the same
for the caches of other libraries, whose default is a folder in the home directory.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastokd.host.streams import warn

# The variables that name other libraries' caches, and their defaults in the home directory.
OTHERS = {
    "MPLCONFIGDIR": ".config/matplotlib",
    "TRITON_CACHE_DIR": ".triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": None,  # by default in the temporary folder
}
# A path that can never be written.
NOWHERE = Path(os.devnull) / "fastokd"


def cache_root() -> Path:
    """``$FASTOKD_CACHE``, else ``fastokd`` in the user's cache directory, else in the system's
    temporary folder: the first that can be written. A warning names the one that was skipped.

    If none can be written, writing to the result raises OSError.
    """
    roots = cache_roots()
    if len(roots) > 1:
        _say(roots[0], roots[-1])
    return roots[-1]


def cache_roots() -> list[Path]:
    """The folders that were skipped, which may hold old caches, and :func:`cache_root` last."""
    roots: list[Path] = []
    for place in _places():
        roots.append(place)
        if _refusal(place) is None:
            break
    return roots


def settle() -> None:
    """Sets a folder for each other library whose own can't be written, for this process and its
    children. Must run before those libraries are imported."""
    for name, default in OTHERS.items():
        usual = Path.home() / default if default else _system()
        if _refusal(Path(os.environ.get(name) or usual)) is None:
            continue
        root = cache_roots()[-1]
        if _refusal(root) is None:
            os.environ[name] = str(root / name.partition("_")[0].lower())
        else:  # importing torch fails if it can't create the folder that is named
            os.environ.pop(name, None)


def _places() -> Iterator[Path]:
    """The candidates, the preferred one first."""
    if os.environ.get("FASTOKD_CACHE"):
        yield Path(os.environ["FASTOKD_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "fastokd"
    yield Path.home() / ".cache" / "fastokd"
    yield own_folder()


@functools.cache
def _refusal(folder: Path) -> str | None:
    """The reason why ``folder``, which need not exist yet, can't be written; None if it can."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # on a full disk an empty file can still be created
    except OSError as error:
        return error.strerror or str(error)
    return None


def _system() -> Path:
    """The system's temporary folder, or :data:`NOWHERE`."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return NOWHERE


def own_folder() -> Path:
    """This user's folder in the system's temporary folder. :data:`NOWHERE` if others can write to
    it, since libraries are loaded from it."""
    folder = _system() / f"fastokd-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return NOWHERE
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    return folder if private and found.st_uid == os.getuid() else NOWHERE


@functools.cache
def _say(named: Path, instead: Path) -> None:
    """Warns once a process, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        kept = "nothing is kept" if instead == NOWHERE else f"they are in {instead}"
        warn(
            f"caches can't be written to {named} ({_refusal(named)}): {kept}; set FASTOKD_CACHE to a "
            "folder that can be written"
        )
