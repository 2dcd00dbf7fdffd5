"""What a recipe's settings of the optimizer and of frozen stages may not say together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import BELOW_ONE, NOT_NEGATIVE, at_least


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, and which parameters it trains how."""

    optimizer: Annotated[
        Literal["sgd", "adamw", "lamb"], "The optimizer: `sgd`, `adamw` or `lamb`."
    ] = "sgd"
    beta1: Annotated[float, "Decay of the mean gradient; adamw and lamb.", BELOW_ONE] = 0.9
    beta2: Annotated[float, "Decay of the mean square; adamw and lamb.", BELOW_ONE] = 0.999
    eps: Annotated[
        float, "Added to the root of the mean square; 0: 1e-8 in adamw, 1e-6 in lamb.", NOT_NEGATIVE
    ] = 0.0
    decay_norms: Annotated[
        bool, "Weight decay also for norms, biases and other parameters of one dimension."
    ] = True
    head_lr: Annotated[
        float, "Learning rate of the students' last layers in place of lr; 0 for lr.", NOT_NEGATIVE
    ] = 0.0
    frozen_stages: Annotated[
        int,
        "First stages of every student that aren't trained in the first frozen_epochs; -1 for all, so "
        "that only heads are trained.",
        at_least(-1),
    ] = 0
    frozen_epochs: Annotated[int, "Epochs in which frozen_stages are frozen.", at_least(0)] = 0


def check_optimizer(recipe: Any) -> None:
    """Raises UserError for settings that contradict each other."""
    if recipe.optimizer == "sgd" and recipe.nesterov and recipe.momentum == 0:
        raise UserError("momentum is 0, which Nesterov's can't be: set nesterov to false")
    if recipe.frozen_epochs > recipe.epochs:
        raise UserError(
            f"frozen_epochs is {recipe.frozen_epochs}: it must be at most epochs, {recipe.epochs}"
        )
