"""``engine="auto"``: times candidates on the run's own batches and keeps the fastest.

All candidates have the requested ``compile``, ``capture`` and ``memory_format``. A run too short to
gain isn't measured. A candidate that fails is a row of the table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from fastokd.cohort.choice import Choice
from fastokd.cohort.cohort import ENGINES
from fastokd.device import environment, is_lost
from fastokd.errors import UserError
from fastokd.host.caches import cache_root
from fastokd.learner.state import snapshot
from fastokd.run.autotuner import SAVABLE, Timing, eager_candidates, pick, table
from fastokd.run.interruption import StopRequest
from fastokd.run.options import KEPT
from fastokd.run.session import Session
from fastokd.run.timing_cache import TimingCache
from fastokd.run.trial import TIMED_STEPS, time_compiled, time_eager, warm_up_steps

# The two fastest engines are tried compiled.
COMPILED = 2
# Options that don't change a step's time, or that ``step_key`` has resolved.
ELSEWHERE = {
    *("device", "precision", "engine", "loader", "overfit_batch", "sync_bn", "init", "eval_every")
}


def tune(
    session: Session,
    steps: int,
    say: Callable[[str], None] = lambda text: None,
    stop: StopRequest | None = None,
) -> list[Timing]:
    """Chooses the engine of an unsettled session for ``steps`` more steps; returns the timings.

    All ranks take the choice of the first. If ``stop`` receives a signal, the session stays unsettled
    and keeps its default.

    Raises:
        UserError: no candidate can run with the options; on every rank.
        DeviceLostError: a candidate made the GPU unusable for this process; later runs exclude it.
    """
    if session.settled:
        return []
    timings: list[Timing] = []

    def measured() -> tuple[Choice, bool]:
        asked = stop or StopRequest()
        with TimingCache(cache_root(), step_key(session)) as cache, asked.telling(cache.clear):
            timings.extend(_measure(session, steps, cache, lambda: asked.received is not None))
        settled = asked.received is None
        chosen = _chosen(session, timings, steps) if settled else session.learner.choice
        if any(timing.step_ms is not None for timing in timings):
            cache.write(timings)
            if settled:
                say(table(timings, chosen))
        return chosen, settled

    chosen, session.settled = session.learner.ranks.first(measured)
    session.learner.adopt(chosen)
    return timings


def step_key(session: Session) -> dict[str, Any]:
    """All that a step's time depends on: the key of cached timings."""
    recipe, options = session.recipe, session.options
    machine = environment(session.learner.device, session.learner.precision)
    names = ("fastokd", "torch", "device", "gpu", "cpu", "threads", "waiting", "precision")
    return {
        **{name: machine[name] for name in names},
        "models": recipe.models,
        "model_options": recipe.model_options,
        "sharing": recipe.sharing,
        "method": [recipe.method, {k: str(v) for k, v in recipe.method_options.items()}],
        "classes": session.learner.cohort.num_classes,
        "batch": [recipe.batch_size // session.learner.ranks.data.size, recipe.image_size],
        "options": {name: getattr(options, name) for name in KEPT if name not in ELSEWHERE},
    }


def _chosen(session: Session, timings: list[Timing], steps: int) -> Choice:
    """The fastest timing that fits the options.

    Raises:
        UserError: no candidate can run with the options.
    """
    options = session.options
    asked = [t for t in timings if options.compile in (None, t.choice.compile)]
    if all(timing.failed for timing in asked):
        flags = " and ".join(
            ["--capture"] * options.capture + ["--compile"] * bool(options.compile)
        )
        raise UserError(
            f"{flags} is asked for, but no engine can ({asked[0].choice}: {asked[0].note}): leave "
            "it out"
        )
    return pick(asked, steps)


def _measure(
    session: Session, steps: int, cache: TimingCache, stopped: Callable[[], bool]
) -> list[Timing]:
    """A timing for each candidate, cached or measured; the default first."""
    options = session.options
    # A damaged file may name an unknown engine.
    known = {choice: timing for choice, timing in cache.read().items() if choice.engine in ENGINES}
    eager = eager_candidates(ENGINES, options.memory_format)
    unknown = [choice for choice in eager if choice not in known]
    trial_steps = warm_up_steps(session) + TIMED_STEPS
    note = f"not timed: {steps} steps are too few to gain by it"
    if unknown and SAVABLE * steps <= 2 * trial_steps * len(unknown):
        timings = [*known.values(), *(Timing(choice, note=note, final=False) for choice in unknown)]
    else:
        with untouched(session) as put_back:

            def time(choice: Choice, before: list[Timing]) -> Timing:
                best_ms = min((t.step_ms for t in before if t.step_ms is not None), default=None)
                # The default is never excluded: if it fails, nothing can run.
                default = choice == eager[0] and not options.capture
                with nullcontext() if default else cache.on_trial(choice):
                    timing = time_eager(session, choice, best_ms, default=default)
                    put_back()
                return timing

            timings = _timings(eager, known, stopped, time)
        if options.compile is not False:
            timings += _compiled(session, timings, steps, known, cache, stopped)
    if session.learner.choice not in [timing.choice for timing in timings]:
        if stopped():
            note = "not timed: the run was stopped"
        timings.append(Timing(session.learner.choice, note=note, final=False))
    return sorted(timings, key=lambda timing: timing.choice != session.learner.choice)


def _compiled(
    session: Session,
    eager: list[Timing],
    steps: int,
    known: dict[Choice, Timing],
    cache: TimingCache,
    stopped: Callable[[], bool],
) -> list[Timing]:
    """Times the fastest engines compiled; with ``--compile`` the default first."""
    times = {t.choice: t.step_ms for t in eager if t.step_ms is not None}
    ranked = sorted(times, key=lambda choice: times[choice])
    best_ms = times[ranked[0]] if ranked else None
    choices = [session.learner.choice] if session.learner.choice.compile else []
    choices += [replace(choice, compile=True) for choice in ranked]

    def time(choice: Choice, _: list[Timing]) -> Timing:
        with cache.on_trial(choice):
            return time_compiled(session, choice, steps, best_ms, stopped)

    return _timings(list(dict.fromkeys(choices))[:COMPILED], known, stopped, time)


def _timings(
    choices: list[Choice],
    known: dict[Choice, Timing],
    stopped: Callable[[], bool],
    time: Callable[[Choice, list[Timing]], Timing],
) -> list[Timing]:
    """The timing of each choice, from ``known`` or by ``time(choice, timings so far)``."""
    timings: list[Timing] = []
    for choice in choices:
        if stopped():
            break
        timings.append(known[choice] if choice in known else time(choice, timings))
    return timings


@contextmanager
def untouched(session: Session) -> Iterator[Callable[[], None]]:
    """Restores the learner at the end, and at each call of the function that it yields.

    The memory of a trial is freed as well, also if it failed.
    """
    learner = session.learner
    choice, training, restore = learner.choice, learner.cohort.training, snapshot(learner)

    def put_back() -> None:
        learner.adopt(choice)  # brings the optimizers' states into the layout of the parameters
        restore()
        learner.train(training)
        gc.collect()  # a step and its graphs refer to each other
        if learner.device.type == "cuda":
            torch.cuda.empty_cache()

    lost = False
    try:
        yield put_back
    except Exception:
        lost = is_lost(learner.device)
        raise
    finally:
        if not lost:
            put_back()
