"""The user whom the machine doesn't know: a container's, with a number but no name and no home."""

from __future__ import annotations

import getpass
import os
import pwd
import tempfile

from fastokd.host.caches import NOWHERE, own_folder


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
        os.environ["HOME"] = _own_home()


def _own_home() -> str:
    """A folder that is nobody else's, the same one each time where that can be."""
    folder = own_folder()
    if folder != NOWHERE:
        return str(folder)
    try:
        return tempfile.mkdtemp(prefix="fastokd-")
    except OSError:
        return os.sep  # nothing is kept
