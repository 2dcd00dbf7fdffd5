"""Runs sections one after another and updates the report at once, so it has all results so far even
if a section or this program is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.child import tail, write_whole
from bench.gpu.place import Place
from bench.gpu.table import Section

POLL = 0.1
# The factor by which a section may exceed its seconds if later sections don't need them.
STRETCH = 1.5
# The same in a dry run, as slow machines need more time.
DRY_STRETCH = 5.0
LOG_BYTES = 1 << 20
MARK = "FASTOKD_GPU_SECTION"


class Runner:
    """The report of one call.

    Attributes:
        report: ``calls`` (the machine and the program, one a call) and ``sections`` by name, each
            with its ``status`` (ok, failed, timeout, skipped, stopped), ``call``, ``seconds``,
            ``figures``, ``rows``, ``failures`` and ``error``.
    """

    def __init__(
        self,
        report: dict[str, Any],
        path: Path,
        place: Place,
        *,
        budget: float,
        dry: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.report, self.path, self.place = report, path, place
        self.log = path.with_suffix(".log")
        self.dry, self.say = dry, say
        self.ends = time.monotonic() + budget
        self.stopped: int | None = None
        self._merged = ""

    def stop(self, number: int, frame: object) -> None:
        """A signal handler: the running section is killed, and no other one is started."""
        del frame
        self.stopped = number

    def write(self) -> None:
        """Writes the report."""
        write_whole(self.path, json.dumps(self.report, indent=1))

    def run(self, chosen: Sequence[Section]) -> None:
        """Runs each section for which time is left."""
        self.log.touch()
        for index, section in enumerate(chosen):
            left = self.ends - time.monotonic()
            if self.stopped is not None:
                entry = self._skip(section, "the program was stopped before it")
            elif left < section.seconds:
                why = f"{left:.0f} s of the budget were left, and it needs {section.seconds:g}"
                entry = self._skip(section, why)
            else:
                later = sum(other.seconds for other in chosen[index + 1 :])
                stretch = DRY_STRETCH if self.dry else STRETCH
                longest = min(stretch * section.seconds, left - later)
                entry = self._run(section, max(section.seconds, longest))
            self.write()
            self.say(line(section.name, entry))

    def _skip(self, section: Section, why: str) -> dict[str, Any]:
        entry = {"title": section.title, "status": "skipped", "error": why}
        known = self.report["sections"].get(section.name, {})
        if known.get("status", "skipped") == "skipped":  # results of an earlier call are kept
            self.report["sections"][section.name] = entry
        return entry

    def _run(self, section: Section, limit: float) -> dict[str, Any]:
        call = len(self.report["calls"]) - 1
        entry: dict[str, Any] = {"title": section.title, "status": "running", "call": call}
        self.report["sections"][section.name] = entry
        self._merged = ""
        self.write()
        file = self.place.work / f"{section.name}.json"
        begun = self.log.stat().st_size
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "bench.gpu.child", section.target, str(file), f"{limit}"]
        started = time.monotonic()
        with open(self.log, "ab") as log:
            log.write(f"\n===== {section.name}: {section.title}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*command, *(["--dry-run"] if self.dry else [])],
                cwd=self.place.tree,
                env={**self.place.environment(), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            over = self._watch(process.pid, started + limit, lambda: self._merge(entry, file))
        finally:
            _kill(process.pid, mark)
            code = process.wait()
        entry["seconds"] = round(time.monotonic() - started, 1)
        self._merge(entry, file)
        # The output of the section's own processes.
        with open(self.log, "ab") as log:
            for path in sorted(self.place.work.glob(f"{section.name}-*.txt")):
                log.write(f"----- {path.stem}\n".encode() + path.read_bytes())
        ending = tail(_since(self.log, begun))
        if over is not None:
            entry["status"], why = over
            at = ", ".join(entry.get("running", []))
            entry["error"] = f"{why}{f' in {at}' if at else ''}; its last lines:\n{ending}"
        elif code != 0:
            entry["status"] = "failed"
            gone = (
                f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with {code}"
            )
            entry["error"] = entry.get("error") or f"{gone}; its last lines:\n{ending}"
        else:
            entry["status"] = "failed" if entry.get("failures") else "ok"
            entry.pop("running", None)
        return entry

    def _watch(self, pid: int, ends: float, changed: Callable[[], None]) -> tuple[str, str] | None:
        """Waits for the section; returns its status and the reason if it must be killed."""
        started = time.monotonic()
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self.stopped is not None:
                return "stopped", f"killed because {signal.Signals(self.stopped).name} came"
            if time.monotonic() > ends:
                return "timeout", f"killed after {time.monotonic() - started:.0f} s"
            changed()
            time.sleep(POLL)
        return None

    def _merge(self, entry: dict[str, Any], file: Path) -> None:
        """Merges the section's results so far into the report."""
        try:
            found = file.read_text()
        except FileNotFoundError:
            return
        if found != self._merged:
            self._merged = found
            entry.update(json.loads(found))
            self.write()


def _kill(pid: int, mark: str) -> None:
    """Kills the section's process group, then processes outside of it that have its mark."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's process, or an ended one
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def _since(log: Path, begun: int) -> str:
    """The log from byte ``begun``; in a long one the middle is removed."""
    with open(log, "r+b") as file:
        file.seek(begun)
        text = file.read()
        if len(text) > LOG_BYTES:
            half = LOG_BYTES // 2
            text = text[:half] + b"\n[...]\n" + text[-half:]
            file.seek(begun)
            file.write(text)
            file.truncate()
    return text.decode(errors="replace")


def line(name: str, entry: dict[str, Any]) -> str:
    """A section in one line: its status and first figures."""
    figures = list(entry.get("figures", {}).items())[:3]
    said = ", ".join(f"{key} {value:.4g}" for key, value in figures)
    if entry["status"] == "skipped":
        said = entry["error"]
    seconds = entry.get("seconds", 0)
    return f"{name:15} {entry['status']:8} {seconds:5.0f} s  {said}"
