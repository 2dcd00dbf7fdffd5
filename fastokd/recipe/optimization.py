"""What a recipe's settings of the optimizer and of frozen stages may not say together."""

from __future__ import annotations

from typing import Any

from fastokd.errors import UserError

# For each setting's value, the settings that then mean nothing.
UNUSED = {
    ("schedule", "step"): (),
    ("schedule", None): ("milestones", "lr_decay"),
    ("optimizer", "sgd"): ("beta1", "beta2", "eps"),
    ("optimizer", None): ("momentum", "nesterov"),
}


def check_optimizer(recipe: Any) -> None:
    """Raises UserError for settings that contradict each other."""
    if recipe.optimizer == "sgd" and recipe.nesterov and recipe.momentum == 0:
        raise UserError("momentum is 0, which Nesterov's can't be: set nesterov to false")
    if recipe.frozen_stages and not recipe.frozen_epochs:
        raise UserError(
            f"frozen_stages is {recipe.frozen_stages}, but frozen_epochs is 0: set it to the number of "
            f"epochs in which they are frozen, {recipe.epochs} for all"
        )
    if recipe.frozen_epochs and not recipe.frozen_stages:
        raise UserError(
            f"frozen_epochs is {recipe.frozen_epochs}, but frozen_stages is 0: set it to the number of "
            "stages that are frozen, or leave both out"
        )


def unused(recipe: Any) -> dict[str, str]:
    """The settings that mean nothing under this schedule and optimizer, and which of them it is."""
    chosen = {"schedule": recipe.schedule, "optimizer": recipe.optimizer}
    return {
        name: f"{setting} {its}"
        for setting, its in chosen.items()
        for name in UNUSED.get((setting, its), UNUSED[setting, None])
    }


def refuse_unused(recipe: Any, given: set[str]) -> None:
    """Raises UserError if one of the settings ``given`` means nothing here."""
    for name, under in unused(recipe).items():
        if name in given:
            raise UserError(
                f"{name} is {getattr(recipe, name)}, which means nothing with the {under}: leave it out"
            )
