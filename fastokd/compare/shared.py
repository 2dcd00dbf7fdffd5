"""The settings that all rows of a comparison share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastokd.recipe.augmentation import AugmentationSettings
from fastokd.recipe.label_loss import LabelLossSettings
from fastokd.recipe.mixing import MixingSettings
from fastokd.recipe.names import recipe
from fastokd.recipe.optimization import OptimizerSettings
from fastokd.recipe.resolution import SizeSettings
from fastokd.recipe.schedule import ScheduleSettings


def _fields(*parts: type) -> tuple[str, ...]:
    return tuple(f.name for part in parts for f in dataclasses.fields(part))


# Those of the data set's recipe for one student, unless the user names a recipe.
SHARED = (
    *(
        "epochs",
        "batch_size",
        "lr",
        "momentum",
        "nesterov",
        "weight_decay",
        "milestones",
        "lr_decay",
    ),
    *("warmup_epochs", "crop_padding", "crop_mode", "resized_crop", "flip"),
    *_fields(OptimizerSettings, ScheduleSettings, AugmentationSettings, SizeSettings),
)
# Of a recipe that the user names, those that it sets; MCL's batches are a method's own.
_WHERE_SET = tuple(
    name for name in _fields(MixingSettings, LabelLossSettings) if name != "images_per_class"
)


def own_settings(name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the user's settings those that each row's own recipe takes: all, or with a recipe that the user
    names those that it doesn't share. Epochs scale what belongs to a method, too."""
    if name is None:
        return dict(given)
    shared = {*SHARED, *_WHERE_SET} - {"epochs"}
    return {key: value for key, value in given.items() if key not in shared}


def settings_of(name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows share of the recipe that the user names, or of its file, ``given`` settings changed;
    nothing without a name.

    Its method, students, model, data set and the settings that belong to a method stay out.
    """
    if name is None:
        return {}
    shareable = {*SHARED, *_WHERE_SET}
    found = recipe(name, **{key: value for key, value in given.items() if key in shareable})
    default = {f.name: f.default for f in dataclasses.fields(found)}
    where_set = [key for key in _WHERE_SET if key in given or getattr(found, key) != default[key]]
    return {key: getattr(found, key) for key in (*SHARED, *where_set)}
