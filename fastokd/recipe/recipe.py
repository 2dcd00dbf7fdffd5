"""A recipe: everything that determines a run's numbers, except the machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from fastokd.errors import UserError, unknown_name
from fastokd.known import DATASETS, Later, place_of
from fastokd.recipe.augmentation import (
    AugmentationSettings,
    check_augmentation,
)
from fastokd.recipe.averages import (
    AverageSettings,
    averaged_students,
    check_averages,
    judged_average,
)
from fastokd.recipe.fields import Setting
from fastokd.recipe.label_loss import LabelLossSettings, check_label_loss
from fastokd.recipe.mixing import MixingSettings, check_mixing
from fastokd.recipe.optimization import OptimizerSettings, check_optimizer
from fastokd.recipe.paper_settings import PaperSettings
from fastokd.recipe.resolution import SizeSettings, check_sizes, scaled_size_epochs
from fastokd.recipe.schedule import ScheduleSettings, check_schedule, rate
from fastokd.recipe.teaching import TeachingSettings, check_teaching
from fastokd.recipe.training_set import TrainingSetSettings
from fastokd.recipe.unused import check_needs
from fastokd.recipe.views import ViewSettings, check_views

# Imported when a recipe is made, not for its name: they import torch.
methods = Later("fastokd.methods")
models = Later("fastokd.models")
cohort = Later("fastokd.cohort.sharing")
seeds = Later("fastokd.seeds")
torch = Later("torch")


@cache
def settings() -> dict[str, Setting]:
    """Every field of :class:`Recipe`, in order."""
    hints = get_type_hints(Recipe, include_extras=True)
    return {name: Setting.of(hint) for name, hint in hints.items()}


def checked(name: str, value: Any) -> Any:
    """``value`` converted to the type of the recipe's field ``name``; raises UserError for another type."""
    return settings()[name].checked(name, value)


@dataclass(frozen=True, repr=False)
class Recipe(
    TrainingSetSettings,
    TeachingSettings,
    ViewSettings,
    AverageSettings,
    MixingSettings,
    LabelLossSettings,
    AugmentationSettings,
    SizeSettings,
    OptimizerSettings,
    ScheduleSettings,
    PaperSettings,
):
    """Everything that determines a run's numbers, except the machine.

    Raises:
        UserError: a value of the wrong type or out of its range; settings that contradict each other.
    """

    def __post_init__(self) -> None:
        """Checks all fields; raises :class:`UserError`."""
        for name, setting in settings().items():
            setting.check(name, getattr(self, name))
        needs = methods.known_needs(self.method)
        if place_of(self.dataset)[0] not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        needs.check(self.method, self.sharing, self.students)
        self._check_students()
        if self.reported == "leader" and not needs.leader:
            raise UserError(f"reported is 'leader', but {self.method} has none: choose 'mean'")
        if (
            isinstance(self.val, float)
            and isinstance(self.test, float)
            and self.val + self.test >= 1
        ):
            raise UserError(
                f"val is {self.val} and test is {self.test}: they must leave some images to train on"
            )
        check_label_loss(self, needs.label_loss)
        if self.crop_padding >= self.image_size:
            raise UserError(
                f"crop_padding is {self.crop_padding}: it must be below image_size, {self.image_size}"
            )
        check_needs(self)
        check_sizes(self)
        check_augmentation(self)
        check_averages(self)
        check_schedule(self)
        check_optimizer(self)
        if not self.model_options.keys().isdisjoint(("name", "num_classes")):
            raise UserError(
                f"model_options is {self.model_options}: leave name and num_classes out, which the "
                "recipe and the data say"
            )
        check_views(self, reads_maps=needs.maps)
        takes_mixed = needs.mixed_labels and self.method_options.get("divergence") != "dkd"
        check_mixing(self, takes_mixed=takes_mixed)
        check_teaching(self, has_teacher=needs.teacher)
        methods.check_options(self.method, self.method_options)
        for name in dict.fromkeys(self.models):
            models.check_options(name, self.model_options)
        temperature = self.method_options.get("temperature", 1.0)
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}: it must be a finite number above 0")

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Recipe({', '.join(given)})"

    def _check_students(self) -> None:
        """Raises for unknown students, or names that don't fit their number or sharing."""
        names = self.model.split("+")
        for name in names:
            models.model_spec(name)
        if len(names) > 1 and len(names) != self.students:
            raise UserError(
                f"students is {self.students}, but {self.model} names {len(names)}: name one for each"
            )
        cohort.check_sharing(self.sharing, names, instead=f"choose {self.method}-network")

    @property
    def models(self) -> tuple[str, ...]:
        """The name of each student."""
        names = tuple(self.model.split("+"))
        return names if len(names) > 1 else names * self.students

    @property
    def kept_student(self) -> int:
        """The number of the student that is kept: the leader. Without a leader, the first; or one
        drawn by the seed if ``reported`` is ``"kept"``."""
        if self.students == 1:
            return 0
        if self.has_leader:
            return self.students - 1
        if self.reported != "kept":
            return 0
        generator = seeds.keyed_generator(self.seed, "kept student")
        return int(torch.randint(self.students, (), generator=generator))

    def score(self, metrics: dict[str, Any]) -> float:
        """The reported accuracy, from the metrics of one split."""
        judged = self.judged(metrics)
        if judged == "average":
            return float(metrics["ema_top1"])
        if judged in ("kept", "student"):
            return float(metrics["student_top1"][self.kept_student])
        return float(metrics[f"{judged}_top1"])

    def judged(self, metrics: dict[str, Any]) -> str:
        """Whose accuracy is reported: that of the averages if they are kept (:func:`judged_average`), of
        the ``"companion"`` if that is kept, else ``reported``; ``"student"`` if there is only one."""
        average = judged_average(self, metrics)
        if average is not None:
            return average
        # A kept student has a companion if the method has any, which only its metrics say without torch.
        kept = "companion_top1" in metrics and self.keep != "raw" and not (self.ema or self.swa)
        if kept and self.reported != "ensemble_logits":
            return "companion"
        return self.reported if self.students > 1 else "student"

    @property
    def averaged(self) -> tuple[int, ...]:
        """The numbers of the students whose weights are averaged."""
        return averaged_students(self)

    def keeps_average(self, student: int) -> bool:
        """Whether a student's average is kept in place of its weights."""
        return self.keep == "average" and student in self.averaged

    def companion_of(self, student: int) -> int | None:
        """The number of the companion (``Needs.companion``) that is kept in a student's place, or None."""
        if self.companion == "none" or self.keep == "raw" or self.averaged:
            return None
        if self.companion == "each":
            return student
        return 0 if student == self.kept_student else None

    @property
    def companion(self) -> str:
        """The method's ``Needs.companion``."""
        return str(methods.known_needs(self.method).companion)

    @property
    def has_leader(self) -> bool:
        """Whether the last student is a leader, which is kept."""
        return methods.method_class(self.method).needs.leader

    @property
    def number_of_views(self) -> int | None:
        """Views of a batch: one for each student, one for a companion of all, and one for a teacher whose
        logits aren't cached. None where all share one."""
        if self.views == "shared":
            return None
        taught = methods.method_class(self.method).needs.teacher and self.cache_teacher == "no"
        return self.students + int(self.companion == "one") + int(taught)

    def learning_rate(
        self, epoch: int, *, warm_up: bool = True, step: int = 0, steps: int = 1
    ) -> float:
        """The learning rate of an epoch, from 0; ``warm_up=False`` ignores the warm-up.

        ``step``, ``steps``: the step within the epoch and the steps of an epoch, where the rate changes
        by step.
        """
        if self.schedule_by == "epoch":
            step, steps = 0, 1
        return rate(self, epoch * steps + step, steps, warm_up=warm_up)

    def frozen_at(self, epoch: int) -> int:
        """The number of first stages that aren't trained in an epoch; -1 for all."""
        return self.frozen_stages if epoch < self.frozen_epochs else 0

    def with_epochs(self, epochs: int) -> Recipe:
        """The same schedule over ``epochs``: every setting that counts epochs is scaled, a method's ``warmup``
        too.

        Milestones and ``mix_epochs`` are rounded to whole epochs, and to 1 at least. Milestones that then
        coincide count once, and those after the last epoch are left out, so that a short run may have
        fewer of them.
        """
        scale = epochs / self.epochs
        options = dict(self.method_options)
        if self.method == "dkd" and "warmup" in options:
            options["warmup"] = options["warmup"] * scale
        milestones = (max(1, round(milestone * scale)) for milestone in self.milestones)
        return dataclasses.replace(
            self,
            epochs=epochs,
            milestones=tuple(dict.fromkeys(m for m in milestones if m < epochs)),
            ramp_epochs=self.ramp_epochs * scale,
            warmup_epochs=self.warmup_epochs * scale,
            average_start=min(round(self.average_start * scale), epochs - 1),
            frozen_epochs=max(min(self.frozen_epochs, 1), round(self.frozen_epochs * scale)),
            mix_epochs=max(1, round(self.mix_epochs * scale)) if self.mix_epochs else 0,
            size_epochs=scaled_size_epochs(self, epochs),
            method_options=options,
        )

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Any) -> Recipe:
        """The recipe of a ``recipe.json``; unknown or missing fields raise."""
        fields = {f.name for f in dataclasses.fields(Recipe)}
        if not isinstance(values, dict) or not values.keys() <= fields:
            extra = sorted(set(values) - fields) if isinstance(values, dict) else repr(values)
            raise UserError(f"this is no recipe of this version: it has {str(extra)[:200]}")
        given: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in values.items()}
        try:
            return cls(**given)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this is no recipe: {error}") from error


Recipe.__doc__ = f"{Recipe.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {name}: {setting.meaning}" for name, setting in settings().items()
)
