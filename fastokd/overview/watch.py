"""The site of ``fastokd watch``: a list of the runs, and each one's page, which follow the runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
import webbrowser
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs

from fastokd.errors import warn
from fastokd.host.names import on_a_line
from fastokd.host.streams import say
from fastokd.overview import html
from fastokd.overview.columns import as_rows, chosen, in_order
from fastokd.overview.listing import Listed, list_runs
from fastokd.overview.pages import Pages
from fastokd.overview.server import Answer, Server, refusal

_OF_A_RUN = re.compile(r"/run/([0-9a-f]{16})/(|page|state\.json)")
# Seconds for which a list of the runs is good, at least; and in units of the time that it takes.
_GOOD, _TIMES = 1.0, 5.0
_JSON = "application/json"


class Site:
    """What the server answers. A URL holds the key of a run and no path: only runs that are listed can
    be read. Links aren't followed."""

    def __init__(self, tops: Sequence[Path]) -> None:
        self.tops = tops
        self.pages = Pages()
        self._lock = threading.Lock()
        self._runs: dict[str, Listed] = {}
        self._good_until = 0.0

    def runs(self) -> dict[str, Listed]:
        """The runs by their key in a URL."""
        # One request looks again; the others get what there is, unless there is nothing yet.
        if time.monotonic() >= self._good_until and self._lock.acquire(
            blocking=not self._good_until
        ):
            try:
                begun = time.monotonic()
                there = [top for top in self.tops if top.is_dir()]
                self._runs = {key_of(run.folder): run for run in list_runs(there, links=False)}
                now = time.monotonic()
                self._good_until = now + max(_GOOD, _TIMES * (now - begun))
            finally:
                self._lock.release()
        return self._runs

    def answer(self, path: str, query: str) -> Answer:
        """The answer to a request for ``path``, as the client wrote it."""
        runs = self.runs()
        if path == "/":
            return _tagged(self._index(list(runs.items()), query), html.POLICY)
        if path == "/state.json":
            return _tagged(json.dumps(as_rows(runs.values())), kind=_JSON)
        found = _OF_A_RUN.fullmatch(path)
        run = runs.get(found[1]) if found else None
        if found is None or run is None:
            return refusal(HTTPStatus.NOT_FOUND)
        page = self.pages.get(run.folder)
        version = "" if page is None else page.version
        if found[2] == "":
            return _tagged(html.frame(run, version), html.POLICY)
        if found[2] == "state.json":
            return _tagged(json.dumps({"version": version, "says": html.says(run)}), kind=_JSON)
        if page is not None and page.html is not None:
            return Answer(page.html, html.KIND, tag=f'"{page.version}"', policy=html.PAGE_POLICY)
        why = "The page of this run is being drawn." if page is None else page.reason
        return _tagged(html.note(why, soon=page is None), html.PAGE_POLICY)

    def _index(self, runs: list[tuple[str, Listed]], query: str) -> str:
        """The list; ``query`` may sort and filter it."""
        every = [run for _, run in runs]
        keys = {run.folder: key for key, run in runs}
        try:
            given = parse_qs(query, max_num_fields=9)
            asked = {name: given[name][-1] for name in given.keys() & {"sort", "state"}}
            shown = in_order(chosen(every, states=asked.get("state")), asked.get("sort", "run"))
        except ValueError:  # UserError, too
            shown, asked = in_order(every), {}
        return html.index([(keys[run.folder], run) for run in shown], every, asked, self.tops)


def key_of(folder: Path) -> str:
    """A run's key in a URL."""
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]


def _tagged(text: str, policy: str = html.POLICY, kind: str = html.KIND) -> Answer:
    body = text.encode("utf-8", "backslashreplace")
    return Answer(body, kind, tag=f'"{hashlib.sha256(body).hexdigest()[:16]}"', policy=policy)


def serve(tops: Sequence[Path], host: str, port: int, *, in_browser: bool = False) -> None:
    """Serves the runs below ``tops`` until ^C or SIGTERM.

    Raises:
        UserError: it can't listen there.
    """
    site = Site(tops)
    server = Server(host, port, site.answer)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not server.loopback:
            warn(
                f"whoever reaches {host} can read these runs: leave --host out to keep them to yourself"
            )
        say(f"{server.url} shows the runs in {on_a_line(', '.join(map(str, tops)))}; ^C ends it")
        if in_browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        say("ended")
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()
        site.pages.close()
