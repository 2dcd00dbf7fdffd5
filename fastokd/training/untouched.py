"""Steps that are taken to be timed and then never happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastokd.training.session import Session
from fastokd.training.state import as_state


@contextmanager
def untouched(session: Session) -> Iterator[None]:
    """Gives the session back as it was, to the bit: parameters, buffers, optimizers, averages,
    random numbers, choice of engine, mode."""
    choice, training = session.choice, session.cohort.training
    held = [(tensor, tensor.detach().clone()) for tensor in _held(session)]
    states = [
        {p: {k: _copy(v) for k, v in state.items()} for p, state in optimizer.state.items()}
        for optimizer in session.optimizers
    ]
    average = session.average and {k: v.clone() for k, v in session.average.state.items()}
    scale = session.scaler.state_dict()
    rng = torch.get_rng_state()
    on_gpu = session.device.type == "cuda"
    gpu_rng = torch.cuda.get_rng_state(session.device) if on_gpu else None
    try:
        yield
    finally:
        for optimizer, saved in zip(session.optimizers, states, strict=True):
            optimizer.zero_grad()
            optimizer.state.clear()
            for parameter, state in saved.items():
                optimizer.state[parameter] = state
        session.adopt(choice)
        session.guard.forget()
        session.cohort.train(training)
        session.method.train(training)
        with torch.no_grad():
            for tensor, was in held:
                tensor.copy_(was)
        if session.average is not None and average:
            session.average.load(average)
        if scale:
            session.scaler.load_state_dict(scale)
        torch.set_rng_state(rng)
        if gpu_rng is not None:
            torch.cuda.set_rng_state(gpu_rng, session.device)


def _held(session: Session) -> list[Tensor]:
    return [
        tensor
        for module in (session.cohort, session.method)
        for tensor in (*module.parameters(), *module.buffers())
    ]


def _copy(value: object) -> object:
    return as_state(value, value) if isinstance(value, Tensor) else value
