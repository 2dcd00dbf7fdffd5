"""The optimizers by name, torch's own wherever it has one."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.learner.lamb import Lamb
from fastokd.recipe.recipe import Recipe


def create_optimizer(
    kind: str, groups: list[dict[str, Any]], recipe: Recipe
) -> torch.optim.Optimizer:
    """torch's fused ``"sgd"`` or ``"adamw"``, or ``"lamb"``, by the recipe; ``"adam"`` at its defaults; or
    ``"apex-sgd"`` (:func:`check_apex` comes before)."""
    if kind == "sgd":
        return torch.optim.SGD(
            groups, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
        )
    betas = (recipe.beta1, recipe.beta2)
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=recipe.eps or 1e-8, fused=True)
    if kind == "lamb":
        return Lamb(groups, betas=betas, eps=recipe.eps or 1e-6)
    if kind == "adam":
        return torch.optim.Adam(groups, fused=True)
    assert kind == "apex-sgd"
    from apex.optimizers import FusedSGD

    for group in groups:
        # Apex takes numbers, and reads them anew each step.
        group["lr"] = float(group["lr"])
    return FusedSGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov)


def check_apex(recipe: Recipe) -> None:
    """Raises UserError where NVIDIA apex's SGD isn't there, or can't do what the recipe says."""
    reason = apex_missing()
    if reason is not None:
        raise UserError(
            f"apex is asked for, but {reason}: leave --apex out, torch's sgd is as fast"
        )
    if recipe.optimizer != "sgd":
        raise UserError(
            f"apex is asked for, but it replaces sgd only, and the optimizer is {recipe.optimizer}: leave "
            "--apex out"
        )
    if recipe.schedule_by == "step":
        raise UserError(
            "apex is asked for, but it reads the learning rate on the host, and schedule_by is step: "
            "leave --apex out"
        )


def made_ready(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gives momentum its zeros; what a step by ``optimizer`` writes that the flag can't hold back.

    Torch's fused SGD makes its momentum in the first step, and where that one isn't taken leaves it
    as the memory was.
    """
    written: list[Tensor] = []
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                written += [parameter, state["momentum_buffer"]]
        else:
            written += group["params"]
    return [] if _reads_flag(optimizer) else written


def step_unless(optimizer: torch.optim.Optimizer, untaken: Tensor) -> None:
    """The optimizer's step, which a fused one leaves out where the 0-d ``untaken`` isn't 0."""
    if _reads_flag(optimizer):
        optimizer.found_inf = untaken  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if "capturable" in group:
            # Fused Adam counts its steps on the device either way. It raises where it is captured and
            # not marked so, and warns where it is marked and not captured.
            group["capturable"] = untaken.is_cuda and torch.cuda.is_current_stream_capturing()
    optimizer.step()


def _reads_flag(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Gives a group its learning rate: in place where it is a tensor, which a captured step reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@torch.no_grad()
def set_rates(groups: list[dict[str, Any]], rates_G: Tensor) -> None:
    """Gives each group its rate of ``rates_G``, on the device: a part of a step."""
    torch._foreach_copy_([group["lr"] for group in groups], list(rates_G.unbind()))


def apex_missing() -> str | None:
    """Why NVIDIA apex can't serve, or None. PyPI's ``apex`` is another program altogether."""
    try:
        installed = metadata.version("apex")
    except metadata.PackageNotFoundError:
        return "NVIDIA apex isn't installed (it is built from its repository, not from PyPI)"
    try:
        from apex.optimizers import FusedSGD  # noqa: F401
    except ImportError:
        return (
            f"the installed apex {installed} isn't NVIDIA's: PyPI's package of that name is "
            "another program"
        )
    if not torch.cuda.is_available():
        return "apex's FusedSGD needs a GPU"
    return None


def as_state(value: Tensor, like: Tensor) -> Tensor:
    """A copy on the device of ``like`` and in its memory layout; a count stays a count."""
    if value.dim() == 0:
        return value.to(like.device, copy=True)
    if value.shape != like.shape:
        raise ValueError(f"an optimizer's {list(value.shape)} for a parameter {list(like.shape)}")
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
