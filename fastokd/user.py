"""The user whom the machine doesn't know: a container's, with a number but no name and no home."""

from __future__ import annotations

import getpass
import os
import pwd
import stat
import tempfile
from pathlib import Path


def make_known() -> None:
    """Gives a user without a name or a home both, for this process and its children.

    torch, Triton and matplotlib look for them, and some of them end without.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.environ.get("HOME"):
        return
    try:
        os.environ["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        os.environ["HOME"] = _own_folder()


def _own_folder() -> str:
    """A folder that is nobody else's, the same one each time where that can be."""
    try:
        folder = Path(tempfile.gettempdir(), f"fastokd-uid{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return str(folder)
        return tempfile.mkdtemp(prefix="fastokd-")
    except OSError:
        return os.sep  # nothing is kept


make_known()
