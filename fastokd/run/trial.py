"""One candidate of ``engine="auto"``, timed over a few steps; or why it can't take them.

An eager candidate runs in this process. A compiled one runs in a process of its own
(``tuning_worker.py``), which is killed when it has cost what it could save.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor

from fastokd.cohort.choice import Choice
from fastokd.device import is_lost
from fastokd.errors import DeviceLostError, UserError, in_one_line
from fastokd.learner.captured import WARM_UP_STEPS
from fastokd.learner.step import training_step
from fastokd.run.autotuner import SAVABLE, Timing
from fastokd.run.out_of_memory import saying_what_fits
from fastokd.run.session import Session

# Of each candidate: those that warm it up, and these.
TIMED_STEPS = 3
# A candidate this many times slower in its first step isn't timed further.
HOPELESS = 3.0
# What compiling a cohort takes at least: shorter runs don't try.
COMPILE_SECONDS = 60.0
# The most that a compiled trial takes, in seconds.
PATIENCE = 600.0
# Between two looks whether the run is to stop.
LOOK_EVERY = 0.5

Batch = tuple[Tensor, Tensor]


def warm_up_steps(session: Session, compiled: bool = False) -> int:
    """Steps before those that count: one, one more on a GPU (in the first, cuDNN times its algorithms
    for seconds) and where it compiles (the second may compile again, for states that the first one
    made), and those up to a capture."""
    on_gpu = session.learner.device.type == "cuda"
    return 1 + on_gpu + compiled + (WARM_UP_STEPS + 1) * session.options.capture


def time_eager(
    session: Session, choice: Choice, best_ms: float | None, *, default: bool = False
) -> Timing:
    """A few steps of this session by ``choice``, or why it can't; they change it.

    ``default``: raises what its steps raise, as there is nothing else to run.

    Raises:
        DeviceLostError: it took the GPU from this process.
    """
    try:
        return _timed(session, choice, best_ms, default)
    except Exception as error:
        if default:
            raise
        # Other errors may be transient (memory ran out), so they aren't cached.
        final, note = isinstance(error, UserError), in_one_line(error)
        _forget(error)
    if is_lost(session.learner.device):
        raise DeviceLostError(
            f"{choice} made {session.learner.device} unusable for this process ({note}): start again, a run "
            "with --resume; the candidate is then left out"
        )
    return Timing(choice, note=note, failed=True, final=final)


def _timed(session: Session, choice: Choice, best_ms: float | None, default: bool) -> Timing:
    session.learner.adopt(choice, alone=True)
    batch = session.next_batch()
    fits: AbstractContextManager[Any] = nullcontext()
    if default:
        fits = saying_what_fits(session, *batch)
    with fits:
        first = min(time_steps(session, batch, warm_up_steps(session)))
        if best_ms is not None and first > HOPELESS * best_ms:
            return Timing(choice, first, note="one step: far slower")
        return Timing(choice, statistics.median(time_steps(session, batch, TIMED_STEPS)))


def _forget(error: BaseException | None) -> None:
    """Empties the frames that an error and its causes keep: they hold a step's activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def time_steps(session: Session, batch: Batch, count: int) -> list[float]:
    """Milliseconds of each of ``count`` steps, all on one batch."""
    session.learner.train()
    session.begin_epoch()
    return [_one_step(session, *batch) for _ in range(count)]


def _one_step(session: Session, images: Tensor, labels: Tensor) -> float:
    _wait(session.learner.device)
    started = clock()
    session.begin_step(labels.shape[0])
    training_step(session.learner, images, labels)
    _wait(session.learner.device)
    return 1e3 * (clock() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_compiled(
    session: Session,
    choice: Choice,
    steps: int,
    best_ms: float | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Timing:
    """``choice`` in a process of its own, for as long as it could save against ``best_ms``."""
    seconds = PATIENCE
    if best_ms is not None:
        seconds = min(PATIENCE, SAVABLE * steps * best_ms / 1e3)
    if seconds <= COMPILE_SECONDS:
        note = f"not tried: it could save {seconds:.0f} s, and compiling takes longer"
        return Timing(choice, note=note, final=False)
    command = [sys.executable, "-m", "fastokd.run.trial_worker"]
    return Timing(choice, **ask(command, job(session, choice), seconds, stopped))


def job(session: Session, choice: Choice) -> dict[str, Any]:
    """The run's recipe, options and data, for a process that draws its images and is alone."""
    options = replace(
        session.options,
        device=str(session.learner.device),
        precision=session.learner.precision,
        engine=choice.engine,
        compile=choice.compile,
        memory_format=choice.memory_format,
        teacher=None if session.teacher is None else session.teacher.path,
        out=None,
        resume=False,
        init=(),
        parallel="data",
        quiet=True,
    )
    # This rank's share of the batch. What crops images on disk is the loader.
    batch_size = session.recipe.batch_size // session.learner.ranks.data.size
    recipe = replace(session.recipe, batch_size=batch_size, resized_crop=False)
    data = {
        "class_names": list(session.data.class_names),
        "preprocessing": asdict(session.data.preprocessing),
        "image": list(session.next_batch()[0].shape[1:]),
    }
    return {"recipe": recipe.to_json(), "options": options.to_json(), "data": data}


def ask(
    command: list[str],
    told: dict[str, Any],
    seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """What ``command`` answers to what it is told, both in JSON: fields of a :class:`Timing`.

    After ``seconds``, or where the run is ``stopped``, it is killed with all that it started.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for a method of one's own
    env.pop("WORLD_SIZE", None)  # torchrun's: this one is alone
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    end, given = time.monotonic() + seconds, iter([json.dumps(told)])
    try:
        while True:
            try:
                out, errors = process.communicate(next(given, None), timeout=LOOK_EVERY)
                break
            except subprocess.TimeoutExpired:
                if stopped():
                    return {"note": "not timed: the run was stopped", "final": False}
                if time.monotonic() > end:
                    return {"note": f"killed after {seconds:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        lines = errors.strip().splitlines() or [f"it ended with {process.returncode}"]
        return {"note": f"it failed: {lines[-1][:200]}", "failed": True}
    for line in reversed(out.splitlines()):
        with suppress(ValueError):  # a module of the user's may print at its end
            answer: dict[str, Any] = json.loads(line)
            return answer
    return {"note": "it answered nothing", "failed": True}
