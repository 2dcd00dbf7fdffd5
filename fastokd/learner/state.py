"""A session's state as one flat set of tensors and plain facts: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastokd.distributed.ranks import speaks
from fastokd.errors import UserError, warn
from fastokd.learner.ema import LeaderAverage

if TYPE_CHECKING:
    from fastokd.run.session import Session


# Of a folder, mean and deviation change by less when a few files do, or how they are read.
CHANGED = 0.05
# Earlier versions summed in another order.
ROUNDED = 1e-9


def state_of(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a resumed run needs: tensors by name, and plain facts.

    Optimizer state is kept under its parameter's name, so that it fits any engine.
    """
    tensors = {f"cohort.{k}": v for k, v in session.cohort.state_dict().items()}
    tensors |= {f"method.{k}": v for k, v in session.method.state_dict().items()}
    names = _named_parameters(session)
    for optimizer in session.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optim.{names[parameter]}:{key}"] = value
    if session.average is not None:
        tensors |= {f"ema.{k}": v for k, v in session.average.state.items()}
        tensors["ema_updates"] = session.average.updates
    tensors |= {f"meter.{k}": v for k, v in session.meter.totals.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if session.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(session.device)
    facts = {
        "recipe": session.recipe.to_json(),
        "epoch": session.epoch,
        "batch": session.batch,
        "step": session.step,
        "best": session.best,
        "skipped": session.skipped,
        "class_names": list(session.data.class_names),
        "mean": list(session.data.mean),
        "std": list(session.data.std),
        "how": session.how(),
        "ema": None if session.average is None else session.average.decay,
        "scaler": session.scaler.state_dict(),
        "ranks": list(session.ranks.arrangement),
    }
    return tensors, facts


def load_state(session: Session, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """The reverse of :func:`state_of`.

    Raises:
        UserError: the checkpoint is of another recipe or of other data, and what differs; or it
            holds what no run of its recipe writes.
    """
    try:
        _check_same(session, facts)
        _take(session, tensors, facts)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"the checkpoint doesn't hold what its recipe asks for: {why}") from error


def check_recipe(session: Session, theirs: dict[str, Any]) -> None:
    """Refuses what another recipe left behind, and says what differs."""
    ours = session.recipe.to_json()
    differing = [
        f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in ours if theirs.get(k) != ours[k]
    ]
    if differing:
        raise UserError(
            f"the checkpoint is of another recipe: it differs in {', '.join(differing)}; "
            "resume with the run's own recipe, or choose another --out"
        )


def _check_same(session: Session, facts: dict[str, Any]) -> None:
    """Refuses a checkpoint of another recipe, or of data with other classes or statistics.

    Statistics that are near are taken over, which is said: a run keeps those that it began with.
    """
    check_recipe(session, facts["recipe"])
    ours = session.data.preprocessing
    theirs = replace(ours, mean=tuple(facts["mean"]), std=tuple(facts["std"]))
    differing = [] if facts["class_names"] == list(session.data.class_names) else ["class_names"]
    changed = theirs.differences(ours, CHANGED)
    if session.data.with_held_out is not None:  # as a run of an earlier version measured them
        mean, std = session.data.with_held_out
        changed = theirs.differences(replace(ours, mean=mean, std=std), ROUNDED) and changed
    for name in [*differing, *changed]:
        raise UserError(
            f"the checkpoint was trained on other data: its {name} differ from those of "
            f"the {session.recipe.dataset} here; give the --data-root that it was trained on"
        )
    if theirs.differences(ours, ROUNDED) and speaks():
        warn(
            f"the images of the {session.recipe.dataset} here have another mean or deviation than the "
            "run began with: the folder has changed since, or an earlier fastokd measured them "
            "otherwise; the run keeps its own"
        )
    session.data = replace(session.data, preprocessing=theirs)
    session.cohort.set_statistics(theirs.mean, theirs.std)


def _take(session: Session, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    for prefix, module in (("cohort.", session.cohort), ("method.", session.method)):
        module.load_state_dict(below(tensors, prefix))
    optim = below(tensors, "optim.")
    by_name = {name: parameter for parameter, name in _named_parameters(session).items()}
    for optimizer in session.optimizers:
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        for key, value in optim.items():
            name, _, entry = key.rpartition(":")
            parameter = by_name[name]
            if parameter in mine:
                optimizer.state[parameter][entry] = as_state(value, parameter)
    if facts.get("ema") is not None:
        # A run that is only evaluated has asked for no average, and is given the one that it has.
        session.average = LeaderAverage(session.cohort, session.kept_student, facts["ema"])
        session.average.load(below(tensors, "ema."), tensors.get("ema_updates"))
    if facts.get("scaler"):
        session.scaler.load_state_dict(facts["scaler"])
    meter = below(tensors, "meter.")
    session.meter.totals = {k: v.to(session.device, copy=True) for k, v in meter.items()}
    if "rng.cpu" in tensors:
        torch.set_rng_state(tensors["rng.cpu"])
    if session.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], session.device)
    session.epoch, session.batch, session.step = (int(facts[k]) for k in ("epoch", "batch", "step"))
    session.best = facts["best"]
    if "rng.cpu" not in tensors:
        session.ranks.seed_global(session.recipe.seed, session.step)
    session.skipped = int(facts.get("skipped", 0))
    session.guard.forget()


def _named_parameters(session: Session) -> dict[Tensor, str]:
    return {
        parameter: f"{where}.{name}"
        for where, module in (("cohort", session.cohort), ("method", session.method))
        for name, parameter in module.named_parameters()
    }


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def as_state(value: Tensor, like: Tensor) -> Tensor:
    """A copy on the device of ``like`` and in its memory layout; a count stays a count."""
    if value.dim() == 0:
        return value.to(like.device, copy=True)
    if value.shape != like.shape:
        raise ValueError(f"an optimizer's {list(value.shape)} for a parameter {list(like.shape)}")
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
