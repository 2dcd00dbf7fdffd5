"""Where each run stands, by the files of its folder; and which process holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastokd.checkpoint import read_object, write_durably
from fastokd.errors import UserError, warn
from fastokd.metrics import MetricLines
from fastokd.reproduce.wanted import Training
from fastokd.run.facts import RunFacts
from fastokd.run.identity import is_done, refuse_another, standing
from fastokd.run.options import RunOptions


@dataclass(frozen=True)
class Standing:
    """A run's state: ``"done"``, ``"running"``, ``"failed"``, ``"begun"`` or ``"missing"``.

    ``epochs`` are whole ones, ``seconds`` those of training so far, without evaluation, and ``rate`` the
    median images/s of its epochs, or None. ``note``: why it failed, or who trains it. ``machine``: what
    it is trained on.
    """

    state: str
    epochs: int = 0
    seconds: float = 0.0
    rate: float | None = None
    note: str = ""
    machine: str = ""


def standing_of(
    out: Path, training: Training, options: RunOptions, *, mine: bool = False
) -> Standing:
    """The state of a run in ``out``; damaged files make it a failed one. ``mine``: this process holds it."""
    name, folder = training.folder, out / training.folder
    held, failed = None if mine else holder(out, name), failure(out, name)
    try:
        rows = MetricLines(folder / "metrics.jsonl").read()
        rates = [row["images_per_second"] for row in rows if row.get("images_per_second")]
        known = {
            "epochs": standing(folder, rows).epochs,
            "seconds": sum(row.get("seconds", 0.0) for row in rows),
            "rate": statistics.median(rates) if rates else None,
            "machine": machine_of(RunFacts(folder).environment()),
        }
        if held is not None:
            return Standing("running", note=held, **known)
        if (folder / "recipe.json").is_file():
            refuse_another(folder, training.entry.recipe, options)
            if is_done(folder, training.entry.recipe, options.max_steps):
                if not any(row.get("test") for row in rows):
                    raise UserError(
                        f"{folder} is done but has no measured epoch: put its metrics.jsonl back"
                    )
                return Standing("done", **known)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        if held is not None:
            return Standing("running", note=held)
        return Standing("failed", note=str(error))
    if failed:
        return Standing("failed", note=failed, **known)
    return Standing("begun" if (folder / "recipe.json").is_file() else "missing", **known)


def machine_of(environment: dict[str, object]) -> str:
    """Device and precision, which decide how fast a run is: ``"NVIDIA H200, bf16"``."""
    if not environment:
        return ""
    on_cpu = f"{environment.get('cpu')}, {environment.get('threads')} threads"
    return f"{environment.get('gpu') or on_cpu}, {environment.get('precision')}"


@contextmanager
def claimed(out: Path, name: str) -> Iterator[bool]:
    """Holds the run ``name`` for this process, so that no other trains it; False if another holds it.

    The claim ends with the process, however that ends.
    """
    path = out / "claims" / name
    path.parent.mkdir(exist_ok=True)
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        taken = _lock(held, fcntl.LOCK_EX)
        if taken:
            os.truncate(held, 0)
            who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
            os.write(held, who.encode())
        yield taken
    finally:
        os.close(held)


def holder(out: Path, name: str) -> str | None:
    """The process that holds a run, or trains it by another command, in words; None if none does."""
    for path in (out / "claims" / name, out / name):
        try:
            held = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            if not _lock(held, fcntl.LOCK_SH):
                who = os.read(held, 200).decode(errors="replace") if path.is_file() else ""
                return who or "another process"
        finally:
            os.close(held)
    return None


def _lock(held: int, kind: int) -> bool:
    try:
        fcntl.flock(held, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        warn(f"runs can't be locked ({error}): start no second process on this folder")
    return True


def failure(out: Path, name: str) -> str:
    """Why the run failed the last time that it was trained; "" if it didn't."""
    with suppress(UserError):
        return str(read_object(out / "failures" / f"{name}.json", "failure").get("why", ""))
    return "its file in failures/ is damaged: the next call trains it again"


def note_failure(out: Path, name: str, why: str) -> None:
    """Keeps the reason; "" removes it."""
    path = out / "failures" / f"{name}.json"
    if not why:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    facts = {"why": why, "when": time.strftime("%F %T"), "log": f"logs/{name}.txt"}
    write_durably(path, (json.dumps(facts) + "\n").encode())
