"""Undoes the steps that were taken for timing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastokd.device import gradient_scaler, is_lost
from fastokd.learner.guard import random_state, set_random_state
from fastokd.run.session import Session


@contextmanager
def untouched(session: Session) -> Iterator[Callable[[], None]]:
    """Gives the session back as it was, to the bit: parameters, buffers, optimizers, averages,
    random numbers, choice of engine, mode. So does each call of what it yields.

    A step that failed half-way is undone like any other; the memory that it took is let go.
    """
    choice, training = session.choice, session.cohort.training
    held = [(tensor, _kept(tensor)) for tensor in _held(session)]
    states = [
        {
            p: {k: _kept(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            for p, state in optimizer.state.items()
        }
        for optimizer in session.optimizers
    ]
    scale = session.scaler.state_dict()
    random = random_state(session.device)

    def put_back() -> None:
        for optimizer, saved in zip(session.optimizers, states, strict=True):
            optimizer.zero_grad()
            optimizer.state.clear()
            for parameter, state in saved.items():
                optimizer.state[parameter] = dict(state)
        session.adopt(choice)  # which lays the optimizers' states out as the parameters lie
        session.guard.forget()
        session.cohort.train(training)
        session.method.train(training)
        with torch.no_grad():
            for tensor, was in held:
                tensor.copy_(was)
        if scale:
            # A new one: the old may stand between the unscaling and the update of a failed step.
            session.scaler = gradient_scaler(session.device, session.precision)
            session.scaler.load_state_dict(scale)
        set_random_state(random, session.device)
        gc.collect()  # a step program and its graphs refer to each other
        if session.device.type == "cuda":
            torch.cuda.empty_cache()

    lost = False
    try:
        yield put_back
    except Exception:
        lost = is_lost(session.device)
        raise
    finally:
        if not lost:
            put_back()


def _held(session: Session) -> list[Tensor]:
    held = [] if session.average is None else session.average.tensors()
    for module in (session.cohort, session.method):
        held += [*module.parameters(), *module.buffers()]
    return held


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the host: a trial needs the GPU's memory."""
    return tensor.detach().to("cpu", copy=True)
