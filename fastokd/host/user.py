"""Users without a name or a home directory, as in containers."""

from __future__ import annotations

import getpass
import os
import pwd
import tempfile

from fastokd.host.caches import NOWHERE, own_folder


def make_known() -> None:
    """Sets LOGNAME and HOME for a user without them, for this process and its children.

    torch, Triton and matplotlib read them, and some fail without.
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
    """A private folder, the same one each time if possible."""
    folder = own_folder()
    if folder != NOWHERE:
        return str(folder)
    try:
        return tempfile.mkdtemp(prefix="fastokd-")
    except OSError:
        return os.sep  # can't be written: no caches
