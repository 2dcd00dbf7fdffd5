"""Handles steps that the guard skipped: finds the cause, then skips the step or stops the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fastokd.cohort.keys import split_key
from fastokd.errors import DiskError, UserError, warn
from fastokd.learner.guard import set_random_state
from fastokd.learner.state import snapshot
from fastokd.learner.step import parts
from fastokd.run.session import Session


def settle(session: Session, save: Callable[[], None]) -> None:
    """Reads the flag; if it is set, moves the session back to the first non-finite step.

    The step is then skipped (``skip_nonfinite``) and the later ones are repeated, or the state is
    saved and the run stops.

    Raises:
        UserError: no more steps may be skipped; the message names the step and the cause.
    """
    fault = session.learner.guard.read()
    if fault is None:
        return
    session.step -= fault.untaken
    session.batch -= fault.untaken
    set_random_state(fault.random_before, session.learner.device)
    session.learner.guard.forget()
    what = (
        f"step {session.step} (epoch {session.epoch}, batch {session.batch}, counted from 0; seed "
        f"{session.recipe.seed}) isn't finite: {find(session)}"
    )
    most = session.options.skip_nonfinite
    if session.skipped >= most:
        try:
            save()
            kept = "the state before it is saved"
        except DiskError as error:
            kept = f"the state before it couldn't be saved ({error})"
        raise UserError(
            f"{what}; it wasn't taken{_and_skipped(session)}, and {kept}: lower --lr (it is {session.recipe.lr:g}), or continue with --resume --skip-nonfinite "
            f"{session.skipped + 1}"
        )
    session.skipped += 1
    if session.learner.ranks.rank == 0:
        warn(f"{what}; it is skipped, {session.skipped} of {most}")
    set_random_state(fault.random_after, session.learner.device)
    session.step += 1
    session.batch += 1


def find(session: Session) -> str:
    """The first non-finite values of the next step. Repeats the step without its update; the session
    doesn't change."""
    images_BHWC, labels_B = session.next_batch()
    if session.learner.captured is not None:
        session.learner.captured.release()  # an eager step needs the memory
    restore = snapshot(session.learner)
    try:
        # All findings are computed, since the ranks' collectives must match.
        found = list(_findings(session, images_BHWC, labels_B))[:3]
    finally:
        restore()
    # One rank alone may have findings.
    found = next(filter(None, session.learner.ranks.gather(found)), [])
    return ", ".join(found) or "but it is finite when it is repeated: it isn't reproducible"


def _findings(session: Session, images_BHWC: Tensor, labels_B: Tensor) -> Iterator[str]:
    """Non-finite values in the order of the computation."""
    if _is_bad(images_BHWC):
        bad = (~images_BHWC.isfinite()).flatten(-3).any(-1)
        bad_B = bad.view(-1, labels_B.shape[0]).any(0)
        yield f"image {int(bad_B.int().argmax())} of the batch holds {_value(images_BHWC)}"
    yield from _first_bad(_parameters(session), "")
    session.begin_step(labels_B.shape[0])
    images_BHWC, _ = session.mixed(images_BHWC, labels_B)
    learner = session.learner
    for images, labels, progress in parts(learner, images_BHWC, labels_B):
        share = labels.shape[0] / labels_B.shape[0]
        logits_SBC, extra_EBC, loss = learner.eager(images, labels, progress)
        session.learner.scaler.scale(loss.total * share).backward()
        if extra_EBC is not None and _is_bad(extra_EBC):
            yield f"the teacher's logits hold {_value(extra_EBC)}"
        for student, logits_BC in enumerate(logits_SBC):
            if _is_bad(logits_BC):
                yield f"student {student}'s logits hold {_value(logits_BC)}"
        for name, value in loss.parts.items():
            yield from _bad_terms(name, value)
        if _is_bad(loss.total):
            yield f"the loss is {_value(loss.total)}"
    yield from _first_bad(_statistics(session), "would ")
    gradients = [
        (f"the gradient of {name}", parameter.grad)
        for name, parameter in _parameters(session)
        if parameter.grad is not None
    ]
    scale = f" at a loss scale of {session.learner.scaler.get_scale():g}"
    for found in _first_bad(gradients, ""):
        yield found + (scale if session.learner.scaler.is_enabled() else "")


def _parameters(session: Session) -> list[tuple[str, Tensor]]:
    cohort, method = session.learner.cohort, session.learner.method
    own = [(f"the method's {name}", value) for name, value in method.named_parameters()]
    return [*((_owner(name), value) for name, value in cohort.named_parameters()), *own]


def _statistics(session: Session) -> list[tuple[str, Tensor]]:
    cohort, method = session.learner.cohort, session.learner.method
    named = [(_owner(name), value) for name, value in cohort.named_buffers()]
    named += [(f"the method's {name}", value) for name, value in method.named_buffers()]
    return [(name, value) for name, value in named if name.endswith(("_mean", "_var"))]


def _first_bad(named: list[tuple[str, Tensor]], would: str) -> Iterator[str]:
    for name, value in named:
        if _is_bad(value):
            yield f"{name} {would}hold{'' if would else 's'} {_value(value)}"
            return


def _bad_terms(name: str, value: Tensor) -> Iterator[str]:
    """A term of the loss, by student if it has one value for each."""
    if not _is_bad(value):
        return
    if not name.endswith("_S"):
        yield f"the loss's {name} is {_value(value)}"
        return
    for student, term in enumerate(value):
        if _is_bad(term):
            yield f"student {student}'s {name.removesuffix('_S')} is {_value(term)}"


def _owner(name: str) -> str:
    """A tensor's name for a message: ``students.1.fc.weight`` is student 1's fc.weight."""
    student, rest = split_key(name)
    return f"the trunk's {rest}" if student is None else f"student {student}'s {rest}"


def _is_bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(value.isfinite().all())


def _value(value: Tensor) -> str:
    """The first value that isn't finite."""
    return f"{value[~value.isfinite()][0].item()}"


def _and_skipped(session: Session) -> str:
    return f" ({session.skipped} were skipped before it)" if session.skipped else ""
