"""A learner's state as flat tensors by name: what a checkpoint holds, and what a trial restores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastokd.learner.guard import random_state, set_random_state
from fastokd.learner.learner import Learner
from fastokd.learner.optimizers import as_state
from fastokd.models.student import with_versions

State = tuple[dict[str, Tensor], dict[str, Any]]


def state_of(learner: Learner) -> State:
    """All that the next step depends on: tensors by name, and plain facts.

    Optimizer state is kept under its parameter's name, so that it fits any engine.
    """
    tensors = {f"cohort.{k}": v for k, v in learner.cohort.state_dict().items()}
    tensors |= {f"method.{k}": v for k, v in learner.method.state_dict().items()}
    names = {parameter: name for name, parameter in _named_parameters(learner).items()}
    for optimizer in learner.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optim.{names[parameter]}:{key}"] = value
    if learner.average is not None:
        tensors |= learner.average.entries()
    tensors["rng.cpu"], cuda = random_state(learner.device)
    if cuda is not None:
        tensors["rng.cuda"] = cuda
    facts = {
        "scaler": learner.scaler.state_dict(),
        "ranks": list(learner.ranks.arrangement),
    }
    return tensors, facts


@torch.no_grad()
def load_state(learner: Learner, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """The reverse of :func:`state_of`; a tensor that exists already keeps its memory.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: the state is another learner's.
    """
    learner.cohort.load_state_dict(below(tensors, "cohort."))
    learner.method.load_state_dict(with_versions(learner.method, below(tensors, "method.")))
    parameters = _named_parameters(learner)
    states: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in below(tensors, "optim.").items():
        name, _, entry = key.rpartition(":")
        states.setdefault(parameters[name], {})[entry] = value
    for optimizer in learner.optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _load_optimizer(optimizer, parameter, states.get(parameter, {}))
    if learner.average is not None:
        learner.average.load(tensors)
    if facts.get("scaler"):
        learner.scaler.load_state_dict(facts["scaler"])
        # A step that failed leaves the scaler between unscaling and update.
        learner.scaler._per_optimizer_states.clear()
    if "rng.cpu" in tensors:
        cuda = tensors.get("rng.cuda") if learner.device.type == "cuda" else None
        set_random_state((tensors["rng.cpu"], cuda), learner.device)
    learner.guard.forget()


def snapshot(learner: Learner) -> Callable[[], None]:
    """Copies the state to the host; the function that is returned restores it, to the bit."""
    tensors, facts = state_of(learner)
    kept = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    def restore() -> None:
        load_state(learner, kept, facts)

    return restore


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _named_parameters(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{where}.{name}": parameter
        for where, module in (("cohort", learner.cohort), ("method", learner.method))
        for name, parameter in module.named_parameters()
    }


def _load_optimizer(
    optimizer: torch.optim.Optimizer, parameter: Tensor, entries: dict[str, Tensor]
) -> None:
    """Loads one parameter's state; entries that ``entries`` doesn't have are removed."""
    if not entries:
        optimizer.state.pop(parameter, None)
        return
    state = optimizer.state[parameter]
    for name in [name for name in state if name not in entries]:
        del state[name]
    for name, value in entries.items():
        there = state.get(name)
        if isinstance(there, Tensor) and there.shape == value.shape:
            there.copy_(value)  # in place: a captured step reads this memory
        else:
            state[name] = as_state(value, parameter)
