"""rich's console on a standard stream whose failure is ignored."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from fastokd.host.streams import Outlet


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Prints to stdout or ``stderr``. Names are printed as they are, without markup."""
    stream: Any = Outlet(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
