"""Trains one run in its own process, so that its failure doesn't end other runs.

The processes are forked from a server that has imported torch and nothing else, and so start at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fastokd.errors import Interrupted, UserError, in_one_line
from fastokd.recipe.names import Recipe
from fastokd.run.options import RunOptions
from fastokd.run.sweep import run_or_resume
from fastokd.train import train

# Imported once, before the processes are forked; a run would import the last ones at its end.
PRELOADED = [
    "fastokd.train",
    "torch._dynamo",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
]
_SERVER = multiprocessing.get_context("forkserver")
_BLOCKED = {signal.SIGTERM, signal.SIGHUP}


@dataclass
class Child:
    """A run that is being trained."""

    folder: str
    process: BaseProcess
    answer: Connection
    asked: bool = False

    def stop(self) -> None:
        """Asks the run to finish its step, save and exit."""
        self.asked = True
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGTERM)

    def outcome(self) -> tuple[str, str]:
        """``("done", "")``, ``("stopped", "")`` after a signal, or ``("failed", reason)``, once it has ended."""
        self.process.join()
        code = self.process.exitcode or 0
        try:
            state, why = self.answer.recv() if self.answer.poll() else ("", "")
        except (EOFError, OSError):
            state, why = "", ""
        finally:
            self.answer.close()
        if not state and self.asked:  # before its first step
            return "stopped", ""
        if not state and code < 0:
            return "failed", f"its process was killed by {signal.Signals(-code).name}"
        return (state, why) if state else ("failed", f"its process ended with {code}")


def start(
    recipe: Recipe, options: RunOptions, log: Path, *, gpu: str | None, threads: int | None
) -> Child:
    """Starts the run in ``options.out``, which is resumed if it was begun; its output goes to ``log``.

    Args:
        gpu: the only one that the process sees, as ``CUDA_VISIBLE_DEVICES`` names it; None for all.
        threads: of the CPU; None for the default.
    """
    assert options.out is not None
    _begin_server()
    log.parent.mkdir(exist_ok=True)
    here, there = _SERVER.Pipe(duplex=False)
    arguments = (recipe, options, log, gpu, threads, there)
    process = _SERVER.Process(target=_train_here, args=arguments, name=options.out.name)
    process.start()
    there.close()
    return Child(options.out.name, process, here)


def _begin_server() -> None:
    """Starts the server with these signals blocked: one to the whole process group must not end it, since the
    state of the runs is known by it alone."""
    _SERVER.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # it would unblock them
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


def _train_here(
    recipe: Recipe,
    options: RunOptions,
    log: Path,
    gpu: str | None,
    threads: int | None,
    answer: Connection,
) -> None:
    """The process. A signal of the terminal reaches only its parent, which asks it to stop."""
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    print(f"--- {time.strftime('%F %T')}", flush=True)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if threads is not None:
        torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    state, why = "stopped", ""
    try:
        run = run_or_resume(recipe, options, train)
        if run.is_whole or options.max_steps is not None:
            state = "done"
    except Interrupted:
        pass
    except Exception as error:  # the user's, a bug, or too little memory: the page names it
        if not isinstance(error, UserError):
            traceback.print_exc()
        state, why = "failed", in_one_line(error)
        print(why, file=sys.stderr)
    with suppress(OSError):  # the parent is gone
        answer.send((state, why))


def _stop_with_parent() -> None:
    """Sends SIGTERM to this process once its parent has ended; the run saves and exits."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
