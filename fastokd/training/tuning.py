"""``engine="auto"``: candidates are timed on the run's own batches, and the fastest is kept.

Eager candidates run in this process and leave no trace. A compiled one runs in a process of its
own, which is killed when it has cost what it could save. A run too short to gain isn't measured.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor

from fastokd.checkpoint import write_durably
from fastokd.cohort.autotuner import (
    SAVABLE,
    Timing,
    TimingCache,
    eager_candidates,
    pick,
    table,
)
from fastokd.cohort.choice import Choice
from fastokd.cohort.cohort import ENGINES
from fastokd.device import environment
from fastokd.errors import UserError
from fastokd.ops._cpp import cache_root
from fastokd.training.captured import WARM_UP_STEPS
from fastokd.training.session import Session
from fastokd.training.step import training_step
from fastokd.training.untouched import untouched

# Of each candidate: one to warm up, and these.
TIMED_STEPS = 3
# A candidate this many times slower in its first step isn't timed further.
HOPELESS = 3.0
# What compiling a cohort takes at least: shorter runs don't try.
COMPILE_SECONDS = 60.0
# Nobody waits longer than this, however long the run.
PATIENCE = 600.0
# The two fastest engines are tried compiled.
COMPILED = 2


def tune(
    session: Session, steps: int, say: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Chooses for a session of ``steps`` more steps, unless it is settled; what was measured.

    With several processes the first one's choice is everybody's.
    """
    if session.settled:
        return []
    cache = TimingCache(cache_root(), step_key(session))
    timings: list[Timing] = []
    chosen = session.choice
    if session.ranks.rank == 0:
        timings = _measure(session, steps, {t.choice: t for t in cache.read() if t.final})
        chosen = pick(timings, steps)
        if any(timing.step_ms is not None for timing in timings):
            cache.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(cache.path, cache.content(timings))
            say(table(timings, chosen))
    session.adopt(session.ranks.first(lambda: chosen))
    session.settled = True
    return timings


def step_key(session: Session) -> dict[str, Any]:
    """All that a step's time depends on."""
    recipe, options = session.recipe, session.options
    machine = environment(session.device, session.precision)
    names = ("fastokd", "torch", "device", "gpu", "cpu", "threads", "precision")
    return {
        **{name: machine[name] for name in names},
        "models": recipe.models,
        "model_options": recipe.model_options,
        "sharing": recipe.sharing,
        "method": [recipe.method, {k: str(v) for k, v in recipe.method_options.items()}],
        "classes": session.cohort.num_classes,
        "batch": [recipe.batch_size // session.ranks.data.size, recipe.image_size],
        "asked": [options.compile, options.memory_format, options.impl, options.capture],
        "step": [options.accumulate, options.optimizer, options.clip_norm, options.ema is None],
    }


def _measure(session: Session, steps: int, known: dict[Choice, Timing]) -> list[Timing]:
    """A timing for every candidate, the plain loop's first; the known ones as they are."""
    options = session.options
    eager = eager_candidates(ENGINES, options.memory_format)
    if options.compile:
        eager = eager[:1]
    unknown = [choice for choice in eager if choice not in known]
    if unknown and SAVABLE * steps <= 2 * (1 + TIMED_STEPS) * len(unknown):
        note = f"not timed: {steps} steps are too few to gain by it"
        unmeasured = [Timing(choice, note=note, final=False) for choice in unknown]
        timings = [*known.values(), *unmeasured]
        return sorted(timings, key=lambda timing: timing.choice != session.choice)
    timings = []
    with untouched(session):
        for choice in eager:
            best = min((t.step_ms for t in timings if t.step_ms is not None), default=None)
            timings.append(known.get(choice) or time_eager(session, choice, best))
    if options.compile is False or options.capture:
        return timings
    ranked = sorted((t for t in timings if t.step_ms is not None), key=_milliseconds)
    for timing in ranked[:COMPILED]:
        choice = Choice(timing.choice.engine, True, timing.choice.memory_format)
        best_ms = _milliseconds(ranked[0])
        timings.append(known.get(choice) or time_compiled(session, choice, steps, best_ms))
    return timings


def _milliseconds(timing: Timing) -> float:
    assert timing.step_ms is not None
    return timing.step_ms


def time_eager(session: Session, choice: Choice, best_ms: float | None) -> Timing:
    """A few steps of this session by ``choice``, or why it can't."""
    try:
        session.adopt(choice, alone=True)
    except UserError as error:
        return Timing(choice, note=str(error))
    warm_up = 1 + (WARM_UP_STEPS + 1) * session.options.capture
    first = time_steps(session, warm_up)
    if best_ms is not None and min(first) > HOPELESS * best_ms:
        return Timing(choice, min(first), note="one step: far slower")
    return Timing(choice, statistics.median(time_steps(session, TIMED_STEPS)))


def time_steps(session: Session, count: int) -> list[float]:
    """Milliseconds of each of ``count`` steps, all on the batch that is next."""
    images, labels = _next_batch(session)
    session.cohort.train()
    session.method.train()
    session.begin_epoch()
    return [_one_step(session, images, labels) for _ in range(count)]


def _next_batch(session: Session) -> tuple[Tensor, Tensor]:
    return next(iter(session.stream.batches(session.epoch, session.batch)))


def _one_step(session: Session, images: Tensor, labels: Tensor) -> float:
    _wait(session.device)
    started = clock()
    session.begin_step(labels.shape[0])
    training_step(session, images, labels)
    _wait(session.device)
    return 1e3 * (clock() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_compiled(session: Session, choice: Choice, steps: int, best_ms: float) -> Timing:
    """``choice`` in a process of its own, for as long as it could save."""
    budget = SAVABLE * steps * best_ms / 1e3
    if budget <= COMPILE_SECONDS and not session.options.compile:
        note = f"not tried: it could save {budget:.0f} s, and compiling takes longer"
        return Timing(choice, note=note, final=False)
    job = {
        "recipe": session.recipe.to_json(),
        "classes": session.cohort.num_classes,
        "image": list(_next_batch(session)[0].shape[1:3]),
        "choice": [choice.engine, choice.memory_format],
        "device": str(session.device),
        "precision": session.precision,
        "impl": session.options.impl,
        "optimizer": session.options.optimizer,
        "accumulate": session.options.accumulate,
        "teacher": None if session.teacher is None else str(session.teacher.path),
    }
    answer, why = ask(
        [sys.executable, "-m", "fastokd.training.tuning_worker"], job, min(budget, PATIENCE)
    )
    if answer is None:
        return Timing(choice, note=why)
    return Timing(choice, answer["step_ms"], answer["compile_seconds"])


def ask(
    command: list[str], job: dict[str, Any], seconds: float
) -> tuple[dict[str, Any] | None, str]:
    """What ``command`` answers to ``job``, both in JSON; or why it doesn't.

    After ``seconds`` it is killed, and all that it started.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(json.dumps(job), timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, f"killed after {seconds:.0f} s"
    if process.returncode != 0:
        lines = errors.strip().splitlines() or [f"it ended with {process.returncode}"]
        return None, f"it failed: {lines[-1][:200]}"
    return json.loads(out.splitlines()[-1]), ""
