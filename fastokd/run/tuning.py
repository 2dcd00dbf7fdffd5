"""``engine="auto"``: times candidates on the run's own batches and keeps the fastest.

All candidates have the requested ``compile``, ``capture`` and ``memory_format``. A run too short to
gain isn't measured, and tuning takes a small share of a run (:func:`fastokd.run.autotuner.allowance`). A
candidate that fails, or has no time left, is a row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from fastokd.cohort.choice import Choice
from fastokd.cohort.cohort import ENGINES
from fastokd.device import environment, is_lost, release_memory
from fastokd.errors import Interrupted, UserError
from fastokd.host.caches import cache_root
from fastokd.learner.state import snapshot
from fastokd.run.allowance import OVER, Allowance
from fastokd.run.autotuner import SAVABLE, Timing, candidates, pick, table
from fastokd.run.interruption import StopRequest
from fastokd.run.options import KEPT
from fastokd.run.session import Session
from fastokd.run.timing_cache import TimingCache
from fastokd.run.trial import (
    TIMED_STEPS,
    time_compiled,
    time_here,
    timed_steps,
    warm_up_steps,
)

# The two fastest engines are tried compiled.
COMPILED = 2
# Options that don't change a step's time, or that the key or a choice has resolved.
ELSEWHERE = {
    *("device", "precision", "engine", "capture", "streams", "loader", "overfit_batch", "sync_bn"),
    *("init", "eval_every"),
}


def tune(
    session: Session,
    steps: int,
    say: Callable[[str], None] = lambda text: None,
    stop: StopRequest | None = None,
) -> list[Timing]:
    """Chooses the engine of an unsettled session for ``steps`` more steps; returns the timings.

    All ranks take the choice of the first.

    Raises:
        Interrupted: ``stop`` received a signal; the session is as before, and unsettled.
        UserError: no candidate can run with the options; on every rank.
        DeviceLostError: a candidate made the GPU unusable for this process; later runs exclude it.
    """
    if session.settled:
        return []
    timings: list[Timing] = []

    def measured() -> tuple[Choice, int | None]:
        asked = stop or StopRequest()
        allowed = Allowance(steps, say, lambda: asked.received is not None)
        with TimingCache(cache_root(), step_key(session)) as cache, asked.telling(cache.clear):
            timings.extend(_measure(session, cache, allowed))
        if any(timing.step_ms is not None for timing in timings):
            cache.write(timings)
        if asked.received is not None:
            return session.learner.choice, asked.received
        chosen = _chosen(session, timings, steps)
        if any(timing.step_ms is not None or timing.note == OVER for timing in timings):
            say(table(timings, chosen))
        return chosen, None

    chosen, signum = session.learner.ranks.first(measured)
    if signum is not None:
        raise Interrupted(signum)
    session.settled = True
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
        "views": [recipe.number_of_views, recipe.trunk_views],
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
            ["--capture"] * bool(options.capture) + ["--compile"] * bool(options.compile)
        )
        why = f"no engine can ({asked[0].choice}: {asked[0].note})"
        raise UserError(f"{flags} is asked for, but {why}: leave it out" if flags else why)
    return pick(asked, steps)


def _measure(session: Session, cache: TimingCache, allowed: Allowance) -> list[Timing]:
    """A timing for each candidate, cached or measured; the default first."""
    options, default = session.options, session.learner.choice
    both = default.capture and options.capture is None
    plain = [
        choice
        for choice in candidates(
            ENGINES, options.memory_format, [default.capture, *([False] * both)]
        )
        if options.streams in (None, choice.streams)
    ]
    # Timings of other options are cached as well, and a damaged file may name an unknown engine.
    known = {
        choice: timing
        for choice, timing in cache.read().items()
        if replace(choice, compile=False) in plain
    }
    unknown = [choice for choice in plain if choice not in known]
    trial_steps = sum(warm_up_steps(session, choice) + TIMED_STEPS for choice in unknown)
    note = f"not timed: {allowed.steps} steps are too few to gain by it"
    if unknown and SAVABLE * allowed.steps <= 2 * trial_steps:
        timings = [*known.values(), *(Timing(choice, note=note, final=False) for choice in unknown)]
    else:
        timings = _plain(session, plain, known, cache, allowed)
        # A compiled forward has no streams.
        if options.compile or (options.compile is None and not options.streams):
            timings += _compiled(session, timings, known, cache, allowed)
    if default not in [timing.choice for timing in timings]:
        note = allowed.over if allowed.stopped() else note
        timings.append(Timing(default, note=note, final=False))
    return sorted(timings, key=lambda timing: timing.choice != default)


def _plain(
    session: Session,
    choices: list[Choice],
    known: dict[Choice, Timing],
    cache: TimingCache,
    allowed: Allowance,
) -> list[Timing]:
    """Times candidates in this process, each after the memory of the one before it was returned."""
    unknown = [choice for choice in choices if choice not in known]
    with untouched(session) as put_back:
        costs: list[float] = []

        def time(choice: Choice, before: list[Timing]) -> Timing:
            times = [timing.step_ms for timing in before if timing.step_ms is not None]
            if times:
                allowed.limit(times[0])
            step_ms = allowed.step_ms
            count = warm_up_steps(session, choice) + timed_steps(step_ms)
            untimed = not times and step_ms > 0
            if untimed or allowed.left < min(costs, default=count * step_ms / 1e3):
                return Timing(choice, note=OVER, final=False)
            # If the plain loop fails and nothing else ran, nothing can: it is never excluded.
            last_resort = not times and choice == replace(choices[0], capture=False)
            allowed.say(f"timing {unknown.index(choice) + 1} of {len(unknown)}: {choice}")
            left = allowed.left
            with nullcontext() if last_resort else cache.on_trial(choice):
                best_ms = min(times, default=None)
                timing = time_here(session, choice, best_ms, allowed, last_resort=last_resort)
                if not allowed.stopped():  # else it is done once, at the end
                    put_back()
            if times and timing.step_ms is not None:
                costs.append(left - allowed.left)
            return timing

        return _timings(choices, known, allowed, time)


def _compiled(
    session: Session,
    plain: list[Timing],
    known: dict[Choice, Timing],
    cache: TimingCache,
    allowed: Allowance,
) -> list[Timing]:
    """Times the fastest candidates compiled; with ``--compile`` the default first."""
    times = {t.choice: t.step_ms for t in plain if t.step_ms is not None}
    ranked = sorted(times, key=lambda choice: times[choice])
    best_ms = times[ranked[0]] if ranked else None
    choices = [session.learner.choice] if session.learner.choice.compile else []
    choices += [replace(choice, compile=True, streams=False) for choice in ranked]

    def time(choice: Choice, _: list[Timing]) -> Timing:
        if times:
            allowed.limit(next(iter(times.values())))  # unless it is set: all timings were cached
        with cache.on_trial(choice):
            return time_compiled(session, choice, allowed.steps, best_ms, allowed)

    return _timings(list(dict.fromkeys(choices))[:COMPILED], known, allowed, time)


def _timings(
    choices: list[Choice],
    known: dict[Choice, Timing],
    allowed: Allowance,
    time: Callable[[Choice, list[Timing]], Timing],
) -> list[Timing]:
    """The timing of each choice, from ``known`` or by ``time(choice, timings so far)``."""
    timings: list[Timing] = []
    for choice in choices:
        if allowed.stopped():
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
        release_memory(learner.device)

    lost = False
    try:
        yield put_back
    except Exception:
        lost = is_lost(learner.device)
        raise
    finally:
        if not lost:
            put_back()
