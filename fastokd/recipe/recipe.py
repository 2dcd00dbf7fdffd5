"""A recipe: everything that determines a run's numbers, except the machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from fastokd.errors import UserError, unknown_name
from fastokd.known import DATASETS, MOST_PIXELS, Later, place_of
from fastokd.recipe.augmentation import JITTER, RATIOS, SHARES, check_augmentation
from fastokd.recipe.averages import averaged_students, check_averages, judged_average
from fastokd.recipe.fields import (
    BELOW_ONE,
    IMAGES,
    NOT_NEGATIVE,
    POSITIVE,
    Setting,
    at_least,
    at_most,
    between,
)
from fastokd.recipe.label_loss import check_label_loss
from fastokd.recipe.mixing import check_mixing
from fastokd.recipe.optimization import check_optimizer
from fastokd.recipe.resolution import check_sizes
from fastokd.recipe.schedule import Schedule, WarmUp, check_schedule, rate
from fastokd.recipe.teaching import check_teaching
from fastokd.recipe.views import check_views

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


# Whose accuracy a run reports and selects its best epoch by.
Reported = Literal["leader", "mean", "kept", "ensemble_logits"]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run's numbers, except the machine.

    Raises:
        UserError: a value of the wrong type or out of its range; settings that contradict each other.
    """

    name: Annotated[str, "The recipe's name, METHOD[-FORM][-ensemble][@S]/MODEL/DATASET."]
    method: Annotated[str, "The method; the recipe's name says it."]
    model: Annotated[
        str,
        "The student, or several joined by `+`, one for each student of a mixed cohort, the leader's "
        "last; the recipe's name says it.",
    ]
    dataset: Annotated[
        str,
        "The data set, for `hf` and `wds` with its folder as in `hf:PATH`; the recipe's name says it.",
    ]
    sharing: Annotated[str, "`branch` (a shared trunk) or `network`; the recipe's name says it."]
    students: Annotated[int, "Networks trained, leader included.", at_most(64)]
    method_options: Annotated[
        dict[str, Any], "Options of the method; each can also be set by its own name."
    ] = field(default_factory=dict)
    model_options: Annotated[
        dict[str, Any], "Options of every student; each can also be set by its own name."
    ] = field(default_factory=dict)
    epochs: Annotated[
        int,
        "Epochs; a change scales milestones, ramp, warm-up and `mix_epochs`.",
        at_least(1),
        at_most(1_000_000),
    ] = 300
    batch_size: Annotated[int, "Images a step, over all ranks.", at_least(1), at_most(1 << 24)] = (
        128
    )
    lr: Annotated[float, "Learning rate at its highest, before any milestone.", POSITIVE] = 0.1
    momentum: Annotated[float, "Momentum of SGD, at least 0 and below 1.", BELOW_ONE] = 0.9
    nesterov: Annotated[bool, "Nesterov's momentum."] = True
    weight_decay: Annotated[
        float,
        "L2 penalty on all parameters; in adamw and lamb a decay apart from the gradient.",
        NOT_NEGATIVE,
    ] = 5e-4
    milestones: Annotated[
        tuple[int, ...],
        "Epochs (from 0) before which the learning rate is multiplied by `lr_decay`.",
    ] = (150, 225)
    lr_decay: Annotated[float, "Factor of the learning rate at each milestone.", POSITIVE] = 0.1
    warmup_epochs: Annotated[
        float,
        "Epochs in which the rate rises to lr, from lr / warmup_epochs or warmup_lr on; 0 for none.",
        NOT_NEGATIVE,
    ] = 0.0
    ramp_epochs: Annotated[
        float, "R of the distillation ramp, in epochs; 0 for none.", NOT_NEGATIVE
    ] = 80.0
    ramp_first: Annotated[
        int, "The ramp's count of the first epoch (0 in OKDDip, 1 in FFSD).", at_least(0)
    ] = 0
    crop_padding: Annotated[
        int, "Pixels of padding before the random crop; images in memory.", at_least(0)
    ] = 4
    crop_mode: Annotated[Literal["zeros", "reflect"], "The padding: `zeros` or `reflect`."] = (
        "zeros"
    )
    resized_crop: Annotated[
        bool, "Crop an area of the image and resize it instead (RandomResizedCrop)."
    ] = False
    flip: Annotated[bool, "Mirror half of the training images."] = True
    image_size: Annotated[
        int,
        "Height and width in pixels, for data sets of images of any size.",
        at_least(1),
        at_most(MOST_PIXELS),
    ] = 32
    eval_resize: Annotated[
        int,
        "Shorter side in pixels before the centre crop of a held-out image, and in memory of every "
        "image; 0 for none.",
        at_least(0),
    ] = 0
    train_size: Annotated[
        int,
        "The same for the training images alone, where they are streamed; 0 for `image_size`.",
        at_least(0),
        at_most(MOST_PIXELS),
    ] = 0
    first_size: Annotated[
        int,
        "Size of the first training images, which grow in multiples of 32 within `size_epochs`; 0 for one "
        "size.",
        at_least(0),
    ] = 0
    size_epochs: Annotated[
        tuple[int, ...],
        "The last epoch of `first_size` and the first one of the full size; a change of `epochs` scales "
        "them.",
    ] = ()
    val: Annotated[
        int | float,
        "Images held out of the training set, stratified by class and the same for every seed: a number, "
        "or a fraction of each class; 0 for none beyond the data set's own.",
        at_least(0),
        IMAGES,
    ] = 0
    test: Annotated[
        int | float,
        "The same for the test split of an image folder that has none; a folder with neither has 0.1 of "
        "each unless given.",
        at_least(0),
        IMAGES,
    ] = 0
    reported: Annotated[
        Reported,
        "Whose accuracy is the run's: the `leader`'s, the `mean` over students, the `kept` student's, "
        "or that of the peers' mean logits, `ensemble_logits`.",
    ] = "mean"
    label_smoothing: Annotated[
        float,
        "Share of the labels that is spread over all classes, in every term with labels.",
        BELOW_ONE,
    ] = 0.0
    ce_weight: Annotated[
        float, "Factor of every term with labels; distillation keeps its weight.", NOT_NEGATIVE
    ] = 1.0
    criterion: Annotated[
        Literal["ce", "bce"],
        "The loss on labels: `ce` (cross-entropy) or `bce` (binary cross-entropy, the mean over classes).",
    ] = "ce"
    target_threshold: Annotated[
        float,
        "With `bce`: a class is a target, wholly, where its smoothed or mixed label is above it; 0 for "
        "none.",
        BELOW_ONE,
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        "Weights of the images in the loss on labels: `none`, or `balanced`, the inverse of their class's "
        "frequency, 1 on average.",
    ] = "none"
    mixup: Annotated[
        float,
        "Alpha of Mixup, whose lambda is of Beta(alpha, alpha); 0 for none.",
        between(0, 1000),
    ] = 0.0
    cutmix: Annotated[float, "The same of CutMix.", between(0, 1000)] = 0.0
    mix_prob: Annotated[float, "The probability that a batch is mixed.", between(0, 1)] = 1.0
    mix_switch_prob: Annotated[
        float,
        "With both, the probability that a batch that is mixed is so by CutMix.",
        between(0, 1),
    ] = 0.5
    mix_epochs: Annotated[
        int,
        "Epochs with mixing, from the first; a change of `epochs` scales them; 0: all.",
        at_least(0),
    ] = 0
    mix_each: Annotated[
        bool, "Lambda, box and choice are drawn for each image; else once for each batch."
    ] = False
    repeats: Annotated[
        int,
        "Repeated augmentation: copies of an image in a batch. An epoch then has as many images as "
        "without, rounded down to a multiple of 256.",
        at_least(1),
        at_most(64),
    ] = 1
    balanced: Annotated[
        bool,
        "Draw every class equally often, with replacement; an epoch has as many images as without.",
    ] = False
    crop_scale: Annotated[
        tuple[float, ...],
        "Smallest and largest area of a resized crop, as fractions of the image's.",
        SHARES,
    ] = (0.08, 1.0)
    crop_ratio: Annotated[
        tuple[float, ...], "Smallest and largest width / height of a resized crop.", RATIOS
    ] = (3 / 4, 4 / 3)
    vertical_flip: Annotated[bool, "Turn half of the training images upside down."] = False
    auto_augment: Annotated[
        Literal["none", "randaugment", "trivialaugment", "cifar10", "imagenet", "svhn"],
        "Automatic augmentation: RandAugment, TrivialAugment (wide), or AutoAugment's policy for the "
        "data set of that name.",
    ] = "none"
    randaugment_ops: Annotated[
        int, "Operations of RandAugment on an image.", at_least(1), at_most(16)
    ] = 2
    randaugment_magnitude: Annotated[int, "Their strength.", between(0, 30)] = 9
    color_jitter: Annotated[
        tuple[float, ...],
        "Brightness, contrast and saturation, whose factors are at most so far from 1, and hue, which "
        "moves by at most so many turns.",
        JITTER,
    ] = (0.0, 0.0, 0.0, 0.0)
    random_erasing: Annotated[
        float, "Probability that a box of an image is filled with the mean colour.", between(0, 1)
    ] = 0.0
    erasing_scale: Annotated[
        tuple[float, ...],
        "Smallest and largest area of the box, as fractions of the image's.",
        SHARES,
    ] = (0.02, 0.33)
    erasing_ratio: Annotated[
        tuple[float, ...], "Smallest and largest height / width of the box.", RATIOS
    ] = (0.3, 3.3)
    cutout: Annotated[
        int,
        "Side in pixels of a square of the mean colour around a random pixel; 0 for none.",
        at_least(0),
    ] = 0
    test_flip: Annotated[
        bool, "Evaluate on the mean of the logits of each image and of its mirror image."
    ] = False
    schedule: Annotated[
        Schedule,
        "How the learning rate falls: `step` (at the milestones), `cosine`, `linear`, `one_cycle` or "
        "`constant`.",
    ] = "step"
    schedule_by: Annotated[
        Literal["epoch", "step"], "When the rate changes: each `epoch` or each `step`."
    ] = "epoch"
    final_lr: Annotated[
        float, "The rate at which cosine, linear and one_cycle end.", NOT_NEGATIVE
    ] = 0.0
    warmup: Annotated[
        WarmUp,
        "The warm-up's form: `scaled` (the schedule's rate times epoch / warmup_epochs), `over` (a line "
        "from warmup_lr to lr over the schedule's beginning) or `before` (the same line before it).",
    ] = "scaled"
    warmup_lr: Annotated[
        float, "The first rate of a warm-up `over` or `before`, and of one_cycle.", NOT_NEGATIVE
    ] = 0.0
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
    ema: Annotated[
        float,
        "Decay of an exponential moving average of a student's weights over the steps, such as 0.999; 0 "
        "for none.",
        BELOW_ONE,
    ] = 0.0
    ema_warmup: Annotated[
        bool, "The decay rises to `ema`: the average spans a tenth of the steps taken at most."
    ] = True
    swa: Annotated[
        bool, "A uniform average of a student's weights over the steps from `average_start` on."
    ] = False
    average_start: Annotated[
        int,
        "The epoch from which weights are averaged; before it the average is a copy of them.",
        at_least(0),
    ] = 0
    average_every: Annotated[
        int,
        "Steps between two updates of the average; an epoch's number as SWA was published.",
        at_least(1),
    ] = 1
    average_students: Annotated[
        Literal["kept", "all"], "Whose weights are averaged: the `kept` student's, or `all`."
    ] = "kept"
    average_norms: Annotated[
        Literal["averaged", "recomputed"],
        "Running statistics of an averaged student: `averaged` as its weights are, or `recomputed` on "
        "training images at each evaluation.",
    ] = "averaged"
    keep: Annotated[
        Literal["average", "raw"],
        "Which weights are reported, kept and exported where there is an average: the `average`, or the "
        "`raw` ones.",
    ] = "average"
    cache_teacher: Annotated[
        Literal["no", "exact", "plain"],
        "Compute the teacher's logits of the training set once: `no` (in every step), `exact` (refused "
        "with augmentation) or `plain` (the teacher sees the images without augmentation). Images in "
        "memory.",
    ] = "no"
    normalise_by: Annotated[
        Literal["data", "model"],
        "Whose mean and deviation normalise the images: the `data` set's, or those that the `model`'s "
        "library states of its published weights.",
    ] = "data"
    views: Annotated[
        Literal["shared", "student"],
        "The augmented images of a batch: `shared` by all networks, or drawn anew for each `student` (and "
        "once more for a teacher).",
    ] = "shared"
    trunk_views: Annotated[
        Literal["each", "all"],
        "Where students with views of their own share a trunk: it runs over `each` view by itself, or over "
        "`all` as one batch.",
    ] = "each"
    teacher: Annotated[str, "The recipe that trains the teacher, where the method has one."] = ""
    seed: Annotated[int, "Seed of weights, order and augmentation.", between(0, 2**32 - 1)] = 0

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
        check_sizes(self)
        check_augmentation(self, {f.name: f.default for f in dataclasses.fields(self)})
        check_averages(self)
        check_schedule(self)
        check_optimizer(self)
        if not self.model_options.keys().isdisjoint(("name", "num_classes")):
            raise UserError(
                f"model_options is {self.model_options}: leave name and num_classes out, which the "
                "recipe and the data say"
            )
        check_views(self.views, self.trunk_views, self.sharing, self.method, needs)
        check_mixing(self, takes_mixed=needs.mixed_labels)
        check_teaching(self, has_teacher=needs.teacher)
        methods.check_options(self.method, self.method_options)
        for name in dict.fromkeys(self.models):
            models.check_options(name, self.model_options)
        temperature = self.method_options.get("temperature", 1.0)
        if temperature <= 0:
            raise UserError(f"temperature is {temperature}: it must be a finite number above 0")

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
        if self.students > 1 and self.has_leader:
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
        """Whose accuracy is reported: that of the averages if they are kept (:func:`judged_average`),
        else ``reported``; ``"student"`` if there is only one."""
        average = judged_average(self, metrics)
        if average is not None:
            return average
        return self.reported if self.students > 1 else "student"

    @property
    def averaged(self) -> tuple[int, ...]:
        """The numbers of the students whose weights are averaged."""
        return averaged_students(self)

    def keeps_average(self, student: int) -> bool:
        """Whether a student's average is kept in place of its weights."""
        return self.keep == "average" and student in self.averaged

    @property
    def has_leader(self) -> bool:
        """Whether the last student is a leader, which is kept."""
        return methods.method_class(self.method).needs.leader

    @property
    def number_of_views(self) -> int | None:
        """Views of a batch: one for each student and one for a teacher. None where all share one."""
        if self.views == "shared":
            return None
        return self.students + methods.method_class(self.method).needs.teacher

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
        """The same schedule over ``epochs``: every setting that counts epochs is scaled.

        Milestones and ``mix_epochs`` are rounded to whole epochs, and to 1 at least. Milestones that then
        coincide count once, and those after the last epoch are left out, so that a short run may have
        fewer of them.
        """
        scale = epochs / self.epochs
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
            size_epochs=tuple(round(epoch * scale) for epoch in self.size_epochs),
        )

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @staticmethod
    def from_json(values: Any) -> Recipe:
        """The recipe of a ``recipe.json``; unknown or missing fields raise."""
        fields = {f.name for f in dataclasses.fields(Recipe)}
        if not isinstance(values, dict) or not values.keys() <= fields:
            extra = sorted(set(values) - fields) if isinstance(values, dict) else repr(values)
            raise UserError(f"this is no recipe of this version: it has {str(extra)[:200]}")
        given: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in values.items()}
        try:
            return Recipe(**given)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this is no recipe: {error}") from error


Recipe.__doc__ = f"{Recipe.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {name}: {setting.meaning}" for name, setting in settings().items()
)
