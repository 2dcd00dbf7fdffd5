"""Settings that have no effect unless another one is set, in one table for every part of a recipe.

Settings that a recipe's base has for one schedule or optimizer, such as SGD's momentum, may stay where another
one is chosen; only those that a user gives are refused (:func:`refuse_unused`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from fastokd.errors import UserError
from fastokd.recipe.schedule import ENDING


class Need(NamedTuple):
    """What settings need; ``why`` and ``fix`` are for the error where it isn't so. ``fix`` may be empty."""

    names: tuple[str, ...]
    is_met: Callable[[Any], bool]
    why: str
    fix: str


NEEDS = (
    Need(
        ("train_size", "first_size"),
        lambda recipe: recipe.resized_crop,
        "images in memory have one size",
        "stream them with resized_crop=true and crop_padding=0",
    ),
    Need(
        ("size_epochs",), lambda recipe: recipe.first_size, "no size grows", "set first_size, too"
    ),
    Need(
        ("crop_scale", "crop_ratio"),
        lambda recipe: recipe.resized_crop,
        "resized_crop is false",
        "set resized_crop to true",
    ),
    Need(
        ("randaugment_ops", "randaugment_magnitude"),
        lambda recipe: recipe.auto_augment in ("randaugment", "timm_randaugment"),
        "auto_augment is {auto_augment}",
        "set auto_augment to randaugment or timm_randaugment",
    ),
    Need(
        ("randaugment_std",),
        lambda recipe: recipe.auto_augment == "timm_randaugment",
        "auto_augment is {auto_augment}",
        "set auto_augment to timm_randaugment",
    ),
    Need(
        ("erasing_scale", "erasing_ratio"),
        lambda recipe: recipe.random_erasing,
        "random_erasing is 0",
        "set it to a probability such as 0.25",
    ),
    Need(
        ("target_threshold",),
        lambda recipe: recipe.criterion == "bce",
        "criterion is {criterion}",
        "set criterion to bce",
    ),
    Need(
        ("mix_prob", "mix_switch_prob", "mix_epochs", "mix_each"),
        lambda recipe: recipe.mixup or recipe.cutmix,
        "mixup and cutmix are 0",
        "set one of them above 0",
    ),
    Need(
        ("mix_switch_prob",),
        lambda recipe: recipe.mixup and recipe.cutmix,
        "only one of mixup and cutmix is above 0",
        "set both above 0",
    ),
    Need(
        (
            *("ema_warmup", "average_start", "average_every", "average_students"),
            "average_norms",
        ),
        lambda recipe: recipe.ema or recipe.swa,
        "no weights are averaged",
        "set ema or swa",
    ),
    Need(
        ("keep",),
        lambda recipe: recipe.ema or recipe.swa or recipe.companion != "none",
        "no weights are averaged",
        "set ema or swa",
    ),
    Need(("ema_warmup",), lambda recipe: recipe.ema, "swa has no decay", "set ema in its place"),
    Need(
        ("trunk_views",),
        lambda recipe: recipe.sharing == "branch",
        "a network form has no trunk",
        "",
    ),
    Need(
        ("trunk_views",),
        lambda recipe: recipe.views == "student",
        "the trunk sees one view",
        "set views to student",
    ),
    Need(
        ("view_kinds",),
        lambda recipe: recipe.views == "student",
        "all networks share one view",
        "set views to student",
    ),
    Need(
        ("final_lr",),
        lambda recipe: recipe.schedule in ENDING,
        "the schedule {schedule} has no final rate",
        f"choose {', '.join(ENDING[:-1])} or {ENDING[-1]}",
    ),
    Need(
        ("warmup_lr",),
        lambda recipe: recipe.warmup != "scaled" or recipe.schedule == "one_cycle",
        "the warm-up 'scaled' begins at lr / warmup_epochs",
        "set warmup to over or before",
    ),
    Need(
        ("frozen_stages",),
        lambda recipe: recipe.frozen_epochs,
        "frozen_epochs is 0",
        "set it to the number of epochs in which they are frozen, {epochs} for all",
    ),
    Need(
        ("frozen_epochs",),
        lambda recipe: recipe.frozen_stages,
        "frozen_stages is 0",
        "set it to the number of stages that are frozen",
    ),
)
# The same of settings that a base may have: a choice, and those that have an effect under it alone.
UNDER = {
    ("schedule", ("step",)): ("milestones", "lr_decay"),
    ("optimizer", ("adamw", "lamb")): ("beta1", "beta2", "eps"),
    ("optimizer", ("sgd",)): ("momentum", "nesterov"),
}


def check_needs(recipe: Any) -> None:
    """Raises UserError for a setting that differs from its default and has no effect in this recipe."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    for names, is_met, why, fix in NEEDS:
        changed = [name for name in names if getattr(recipe, name) != defaults[name]]
        if changed and not is_met(recipe):
            name, values = changed[0], vars(recipe)
            instead = f"{fix.format_map(values)}, or " if fix else ""
            raise UserError(
                f"{name} is {values[name]!r}, but {why.format_map(values)}: {instead}set {name} to "
                f"{defaults[name]!r}"
            )


def unused(recipe: Any) -> dict[str, str]:
    """The settings that have no effect under this schedule and optimizer, and which of them it is."""
    return {
        name: f"{choice} {getattr(recipe, choice)}"
        for (choice, values), names in UNDER.items()
        if getattr(recipe, choice) not in values
        for name in names
    }


def refuse_unused(recipe: Any, given: set[str]) -> None:
    """Raises UserError if one of the settings ``given`` has no effect here.

    Stored recipes of earlier versions have some of them, so they aren't in ``NEEDS``.
    """
    if "views" in given and recipe.number_of_views == 1:
        raise UserError(
            "views is 'student', but one network sees the images: choose several students, or a teacher "
            "without cache_teacher"
        )
    if "mix_prob" in given and recipe.mix_prob == 0:
        raise UserError(
            "mix_prob is 0.0, so that no batch is mixed: set it above 0, or leave mixup and cutmix out"
        )
    for name, under in unused(recipe).items():
        if name in given:
            raise UserError(
                f"{name} is {getattr(recipe, name)}, which means nothing with the {under}: leave it out"
            )
