"""The pages of runs, drawn again when a run has changed, by a process of their own.

Nothing is written into the runs. A request gets the newest page without waiting.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from fastokd.checkpoint import STUDENT
from fastokd.errors import UserError, in_one_line
from fastokd.known import Later

# Imported in the process that draws: it imports torch.
report = Later("fastokd.report.page")

# A run's page is drawn again when one of these has changed.
_MEASURED = ("answers.safetensors", "cost.json")
_SHOWN = ("recipe.json", "environment.json", "metrics.jsonl", *_MEASURED, STUDENT)
# Pages that are kept in memory; the seconds that a page may take; the share of a core that drawing a run's
# pages may take from its training.
_KEPT, _LONGEST, _SHARE = 64, 300.0, 0.2


# A page or None, why there is none, and the seconds of CPU time that it took.
Drawn = tuple[bytes | None, str, float]


@dataclass(frozen=True)
class Page:
    """A run's page as HTML, or why there is none. ``version``: of the run's files. ``next``: the time
    before which it isn't drawn again."""

    version: str
    html: bytes | None
    reason: str
    next: float


def version_of(folder: Path) -> str:
    """Changes when the run's files do."""
    parts: list[object] = []
    for name in _SHOWN:
        with suppress(OSError):
            found = os.lstat(folder / name)
            parts.append((name, found.st_mtime_ns, found.st_size, found.st_ino))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Pages:
    """The newest page of each run. One thread waits for the drawing process."""

    def __init__(self) -> None:
        self._pages: OrderedDict[Path, Page] = OrderedDict()
        self._queue: OrderedDict[Path, None] = OrderedDict()
        self._changed = threading.Condition()
        self._ended = False
        self._drawer = _Drawer()
        threading.Thread(target=self._work, daemon=True).start()

    def get(self, folder: Path) -> Page | None:
        """The newest page, or None if there is none yet. Asks for another if the run has changed."""
        version = version_of(folder)
        with self._changed:
            page = self._pages.get(folder)
            if page is not None:
                self._pages.move_to_end(folder)
            stale = page is None or (page.version != version and time.monotonic() > page.next)
            if stale and folder not in self._queue:
                self._queue[folder] = None
                self._changed.notify()
            return page

    def close(self) -> None:
        """Ends the drawing process."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._drawer.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended)
                if self._ended:
                    return
                folder = next(iter(self._queue))
            version = version_of(folder)
            html, reason, seconds = self._drawer.draw(folder)
            page = Page(version, html, reason, time.monotonic() + seconds * (1 / _SHARE - 1))
            with self._changed:
                del self._queue[folder]
                self._pages[folder] = page
                while len(self._pages) > _KEPT:
                    self._pages.popitem(last=False)


class _Drawer:
    """A process that draws pages, one after another; it is begun when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._place = tempfile.TemporaryDirectory(
            prefix="fastokd-watch-", ignore_cleanup_errors=True
        )
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ours: Connection | None = None

    def draw(self, folder: Path) -> Drawn:
        """The page. A process that was killed is begun again, once."""
        failed = None, "drawing it ended the process", _LONGEST
        return self._answer(folder) or self._answer(folder) or failed

    def _answer(self, folder: Path) -> Drawn | None:
        try:
            ours = self._begun()
            ours.send(str(folder))
            if ours.poll(_LONGEST):
                drawn: Drawn = ours.recv()
                return drawn
        except (OSError, EOFError):
            pass
        self._end()
        return None

    def close(self) -> None:
        """Ends the process for good."""
        self._ended = True
        self._end()
        self._place.cleanup()

    def _begun(self) -> Connection:
        with self._lock:
            if self._ended:
                raise EOFError
            if self._ours is None:
                context = multiprocessing.get_context("spawn")
                self._ours, theirs = context.Pipe()
                args = theirs, self._place.name
                self._process = context.Process(target=_draw_all, args=args, daemon=True)
                self._process.start()
                theirs.close()
            return self._ours

    def _end(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.join()
            self._process = self._ours = None


def _draw_all(asked: Connection, place: str) -> None:
    """The drawing process, until the other end is closed. ``place``: a folder for its files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    os.nice(5)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (warnings about a run would be repeated)
    with suppress(EOFError, OSError):
        while True:
            asked.send(_drawn(Path(asked.recv()), Path(place)))


def _drawn(folder: Path, place: Path) -> Drawn:
    html, reason, begun = None, "", time.process_time()
    try:
        _refuse_links(folder)
        html = report.report([folder], place / "page.html", measured=False).read_bytes()
    except Exception as error:
        reason = in_one_line(error)
    return html, reason, time.process_time() - begun


def _refuse_links(folder: Path) -> None:
    """Raises UserError if a run's files are elsewhere."""
    for inside in (folder, folder / "checkpoints"):
        for path in (inside, *(inside.iterdir() if inside.is_dir() else ())):
            if path.is_symlink():
                raise UserError(f"{path} is a symbolic link, through which no run is shown")
