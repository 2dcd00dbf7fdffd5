"""Times one candidate of ``engine="auto"`` over a few steps.

A compiled candidate runs in its own process (``worker.py``), which is killed when it takes longer than
the candidate could save. The others, eager or captured, run in this process.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor

from fastokd.cohort.choice import Choice
from fastokd.data import DatasetSplits, Split
from fastokd.data.preprocessing import Preprocessing
from fastokd.device import is_lost, synchronize
from fastokd.errors import DeviceLostError, UserError, forget, in_one_line
from fastokd.learner.learner import WARM_UP_ALONE
from fastokd.learner.step import training_step
from fastokd.methods import register_method
from fastokd.recipe.augmentation import UNCROPPED
from fastokd.recipe.recipe import Recipe
from fastokd.run.allowance import OVER, STOPPED, Allowance, TrialEndedError
from fastokd.run.autotuner import SAVABLE, Timing
from fastokd.run.build import build
from fastokd.run.options import TUNED, RunOptions
from fastokd.run.out_of_memory import saying_what_fits
from fastokd.run.session import Session
from fastokd.run.worker import Answer, Worker, WorkerEndedError
from fastokd.student.teacher_file import taken_from

# Timed steps of each candidate, after its warm-up.
TIMED_STEPS = 3
# A candidate is dropped when its first step is this many times slower than the best: a short first step
# takes up to three times as long as others (what is made once, and the checks between operators).
HOPELESS = 4.0
# The same for long steps, whose first one takes hardly longer than others.
LONG_HOPELESS = 1.5
# Compiling a cohort takes at least this long.
COMPILE_SECONDS = 60.0
# The longest compiled trial, in seconds.
PATIENCE = 600.0
# A step that takes more milliseconds is timed once, and a trial may be ended within it.
LONG_MS = 1e3

Batch = tuple[Tensor, Tensor]


def warm_up_steps(session: Session, choice: Choice) -> int:
    """Steps before the timed ones: one, one more on a GPU (in the first, cuDNN times its algorithms for
    seconds), one more when compiled (the second may compile again, as the optimizer has a state). With
    a capture: those before it, the capture, and the graph's first replay by itself."""
    if choice.capture:
        return WARM_UP_ALONE + 2
    on_gpu = session.learner.device.type == "cuda"
    return 1 + on_gpu + choice.compile


def time_here(
    session: Session,
    choice: Choice,
    best_ms: float | None,
    allowed: Allowance | None = None,
    *,
    last_resort: bool = False,
) -> Timing:
    """Times a few steps of this session by ``choice``; the steps change its state.

    ``allowed``: a candidate that takes longer isn't timed. ``last_resort``: errors of the steps are
    raised, as no other choice is left.

    Raises:
        DeviceLostError: this process can't use the GPU any more.
    """
    try:
        with warnings.catch_warnings():
            # Of operators that vmap runs once a student: the timing shows what that costs.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return _timed(session, choice, best_ms, allowed or Allowance(), last_resort)
    except Exception as error:
        if last_resort:
            raise
        # Other errors may be transient (memory ran out), so they aren't cached.
        short = isinstance(error.__cause__, torch.OutOfMemoryError)
        final, note = isinstance(error, UserError) and not short, in_one_line(error)
        forget(error)
    if is_lost(session.learner.device):
        raise DeviceLostError(
            f"{choice} made {session.learner.device} unusable for this process ({note}): start again, a run "
            "with --resume; the candidate is then left out"
        )
    return Timing(choice, note=note, failed=True, final=final)


def _timed(
    session: Session,
    choice: Choice,
    best_ms: float | None,
    allowed: Allowance,
    last_resort: bool,
) -> Timing:
    session.learner.adopt(choice, alone=True)
    batch = session.next_batch()
    with saying_what_fits(session, *batch) if last_resort else nullcontext():
        warm_up = warm_up_steps(session, choice)
        times = time_steps(session, batch, warm_up, allowed)
        if len(times) < warm_up:
            return Timing(choice, note=allowed.over, final=False)
        is_long = times[-1] > LONG_MS
        slower = LONG_HOPELESS if is_long else HOPELESS
        if best_ms is not None and min(times) > slower * best_ms:
            return Timing(choice, min(times), note="one step: far slower")
        count, first = timed_steps(times[-1]), times
        if is_long:
            if best_ms is None:
                allowed.limit(times[-1])
            # The first candidate is timed only if another one can be.
            left = count if best_ms is not None else warm_up + 2 * count
            if allowed.left < left * times[-1] / 1e3:
                if best_ms is None:
                    return Timing(choice, note=OVER, final=False)
                return Timing(choice, min(times), note="one step", final=False)
        times = time_steps(session, batch, count, allowed, before=first)
    if len(times) < count:
        return Timing(choice, note=allowed.over, final=False)
    # One time says little on a shared machine, where others only add to it.
    return Timing(choice, min(first[-1], *times) if is_long else statistics.median(times))


def timed_steps(step_ms: float) -> int:
    """How many steps are timed of those that take ``step_ms``."""
    return 1 if step_ms > LONG_MS else TIMED_STEPS


def time_steps(
    session: Session,
    batch: Batch,
    count: int,
    allowed: Allowance | None = None,
    *,
    before: Sequence[float] = (),
) -> list[float]:
    """Milliseconds of each of ``count`` steps, all on one batch; of fewer once the time is over.

    A trial's first step, and each that is long by the one ``before`` it, may end between two operators.
    """
    session.learner.train()
    session.begin_epoch()
    times: list[float] = []
    while len(times) < count and (allowed is None or not allowed.over):
        known = [*before, *times]
        may_be_long = not known or (known[-1] > LONG_MS and not session.learner.choice.capture)
        cut = allowed.cut() if allowed is not None and may_be_long else nullcontext()
        synchronize(session.learner.device)
        started = clock()
        try:
            with cut:
                session.begin_step(len(batch[1]))
                training_step(session.learner, *batch)
                synchronize(session.learner.device)
        except TrialEndedError as ended:
            forget(ended)  # its frames hold the step's activations
            break
        times.append(1e3 * (clock() - started))
    return times


def time_compiled(
    session: Session,
    choice: Choice,
    steps: float,
    best_ms: float | None,
    allowed: Allowance | None = None,
) -> Timing:
    """Times ``choice`` in its own process, killed after the time that it could save over ``best_ms`` or
    once the time that is allowed is over."""
    allowed = allowed or Allowance()
    seconds, left = PATIENCE, allowed.left
    if best_ms is not None:
        seconds = min(PATIENCE, SAVABLE * steps * best_ms / 1e3)
    if seconds <= COMPILE_SECONDS:
        note = f"not tried: it could save {seconds:.0f} s, and compiling takes longer"
        return Timing(choice, note=note, final=False)
    if left <= COMPILE_SECONDS:
        note = f"not tried: tuning may take {max(left, 0):.0f} s more, and compiling takes longer"
        return Timing(choice, note=note, final=False)
    allowed.say(f"compiling and timing {choice}, for at most {min(seconds, left):.0f} s")
    told = job(session, choice)
    answer = ask("fastokd.run.trial:trial_here", told, min(seconds, left), allowed.stopped)
    timing = Timing(choice, **answer)
    # A longer run allows it more time.
    cut_off = timing.step_ms is None and not timing.failed and left < seconds
    return replace(timing, final=False) if cut_off else timing


def ask(make: str, told: Answer, seconds: float, stopped: Callable[[], bool]) -> Answer:
    """Calls the function ``make`` in its own process; returns fields of a :class:`Timing`."""
    own = torch.get_num_threads()
    try:
        with Worker(
            make, told, threads=own, seconds=seconds, stopped=stopped, quiet=True
        ) as worker:
            return worker.first
    except WorkerEndedError as ended:
        note = str(ended)
        if stopped():
            return {"note": STOPPED, "final": False}
        return {"note": note} if note.startswith("killed") else {"note": note, "failed": True}


def job(session: Session, choice: Choice) -> Answer:
    """The run's recipe, options and data shapes, for a single process with random images."""
    options = replace(
        session.options,
        device=str(session.learner.device),
        precision=session.learner.precision,
        **{name: getattr(choice, name) for name in TUNED},
        teacher=tuple(map(taken_from, session.teachers)),
        out=None,
        resume=False,
        init=(),
        parallel="data",
        quiet=True,
    )
    # This rank's share of the batch, once. The loader crops images on disk, not the step.
    batch_size = session.recipe.batch_size // session.learner.ranks.data.size
    recipe = replace(session.recipe, batch_size=batch_size, repeats=1, balanced=False, **UNCROPPED)
    data = {
        "class_names": list(session.data.class_names),
        "preprocessing": asdict(session.data.preprocessing),
        "image": list(session.next_batch()[0].shape[-3:]),
    }
    return {"recipe": recipe.to_json(), "options": options.to_json(), "data": data}


def trial_here(job: Answer) -> tuple[Answer, None]:
    """Trains a few steps on random images; returns the times, or a note why it can't."""
    try:
        if ":" in job["recipe"]["method"]:  # a method of the user
            register_method(job["recipe"]["method"])
        recipe = Recipe.from_json(job["recipe"])
        data = _random_splits(recipe.batch_size, **job["data"])
        session = build(recipe, RunOptions(**job["options"]), data=data)
        batch = session.next_batch()
        before = sum(time_steps(session, batch, warm_up_steps(session, session.learner.choice)))
        step_ms = statistics.median(time_steps(session, batch, TIMED_STEPS))
    except Exception as error:
        # Other programs may have used the memory: another run tries again.
        short = (isinstance(one, torch.OutOfMemoryError) for one in (error, error.__cause__))
        final = not any(short)
        return {"note": in_one_line(error), "failed": True, "final": final}, None
    return {"compile_seconds": before / 1e3, "step_ms": step_ms}, None


def _random_splits(
    count: int, image: list[int], class_names: list[str], preprocessing: dict[str, Any]
) -> DatasetSplits:
    """``count`` random images of the shape ``[H, W, 3]`` for each split."""
    images_NHWC = torch.randint(256, (count, *image), dtype=torch.uint8)
    split = Split(images_NHWC, torch.arange(count) % len(class_names))
    shown = Preprocessing(**preprocessing)
    return DatasetSplits("drawn", tuple(class_names), shown, split, split, split)
