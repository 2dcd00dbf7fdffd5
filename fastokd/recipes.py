"""What to train: functions composed into a frozen Recipe, and a name for each.

A name is ``METHOD/MODEL/DATASET``, the method with its form where it has two:
``okddip-branch/resnet32/cifar100``. Every method, model and data set compose; ``list_recipes``
names those that the papers report.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastokd.data import list_datasets
from fastokd.errors import UserError, unknown_name
from fastokd.methods import list_methods, method_class
from fastokd.models import model_spec


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's numbers, but the machine.

    Attributes:
        students: networks trained, leader included.
        milestones: epochs (from 0) before which the learning rate is divided by 10.
        warmup_epochs: epochs in which the rate rises in equal steps to lr, from lr / warmup_epochs
            in the first; 0 for none.
        ramp_epochs: R of the distillation ramp; 0 for none. ``ramp_first``: the count of the first
            epoch (0 in OKDDip, 1 in FFSD).
        crop_padding, crop_mode, flip: augmentation of in-memory images.
        image_size: for image folders, height and width.
        val: images held out of the training set, stratified by class; 0 for none.
    """

    name: str
    method: str
    model: str
    dataset: str
    sharing: str
    students: int
    method_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 300
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = (150, 225)
    lr_decay: float = 0.1
    warmup_epochs: float = 0.0
    ramp_epochs: float = 80.0
    ramp_first: int = 0
    crop_padding: int = 4
    crop_mode: Literal["zeros", "reflect"] = "zeros"
    flip: bool = True
    image_size: int = 32
    val: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what can't be trained, in one sentence."""
        model_spec(self.model)
        needs = method_class(self.method).needs
        if self.dataset not in list_datasets():
            raise unknown_name("dataset", self.dataset, list_datasets())
        if self.sharing not in needs.sharing:
            raise UserError(
                f"{self.method} has no {self.sharing} form: choose {' or '.join(needs.sharing)}"
            )
        if self.students < needs.min_students:
            role = " (a leader and at least one peer)" if needs.leader else ""
            raise UserError(
                f"students is {self.students}, but {self.method} trains at least "
                f"{needs.min_students}{role}"
            )
        for name, least in (("epochs", 1), ("batch_size", 1), ("val", 0), ("crop_padding", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr}: it must be a finite number above 0")
        for name in ("weight_decay", "momentum", "ramp_epochs", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}: it must be a finite number, at least 0")
        temperature = self.method_options.get("temperature", 1.0)
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature is {temperature}: it must be a finite number above 0")

    @property
    def has_leader(self) -> bool:
        """Whether the last student is the one that is kept."""
        return method_class(self.method).needs.leader

    def learning_rate(self, epoch: int, *, warm_up: bool = True) -> float:
        """The rate of one epoch, counted from 0; ``warm_up=False`` leaves the warm-up out."""
        rate = self.lr * self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones)
        if warm_up and epoch + 1 < self.warmup_epochs:
            rate *= (epoch + 1) / self.warmup_epochs
        return rate

    def with_epochs(self, epochs: int) -> Recipe:
        """The same schedule in other epochs: milestones, ramp and warm-up move in proportion."""
        scale = epochs / self.epochs
        return dataclasses.replace(
            self,
            epochs=epochs,
            milestones=tuple(round(milestone * scale) for milestone in self.milestones),
            ramp_epochs=self.ramp_epochs * scale,
            warmup_epochs=self.warmup_epochs * scale,
        )

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON would give it back."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Recipe:
        """The recipe of a ``recipe.json``; unknown or missing fields raise."""
        fields = {f.name for f in dataclasses.fields(Recipe)}
        if not isinstance(values, dict) or not values.keys() <= fields:
            extra = sorted(set(values) - fields) if isinstance(values, dict) else values
            raise UserError(f"this is no recipe of this version: it has {extra}")
        try:
            return Recipe(**{**values, "milestones": tuple(values["milestones"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"this is no recipe: {error}") from error


def recipe(name: str, **changes: Any) -> Recipe:
    """The recipe called ``name``, with fields of :class:`Recipe` replaced.

    ``epochs`` scales the schedule (:meth:`Recipe.with_epochs`) unless ``milestones`` come with it;
    options of the method are given as ``method_options``.

    Raises:
        UserError: an unknown method, model, data set or form, with the nearest names.
    """
    parts = name.split("/")
    if len(parts) != 3:
        raise UserError(
            f"{name!r} is no recipe: name one as METHOD/MODEL/DATASET, "
            "such as okddip-branch/resnet32/cifar100"
        )
    method, sharing = _method_and_sharing(parts[0])
    model_name, dataset = parts[1], parts[2]
    model_spec(model_name)
    if dataset not in list_datasets():
        raise unknown_name("dataset", dataset, list_datasets())
    base = _published(name, method, sharing, model_name, dataset)
    epochs = changes.pop("epochs", None)
    if epochs is not None:
        if epochs < 1:
            raise UserError(f"epochs is {epochs}: it must be at least 1")
        base = base.with_epochs(epochs)
    if "method_options" in changes:
        changes["method_options"] = {**base.method_options, **changes["method_options"]}
    return dataclasses.replace(base, **changes)


def _method_and_sharing(text: str) -> tuple[str, str]:
    """``okddip-branch`` -> (okddip, branch); a method of one form may leave it out."""
    for sharing in ("branch", "network"):
        if text.endswith(f"-{sharing}"):
            return _known_method(text.removesuffix(f"-{sharing}")), sharing
    method = _known_method(text)
    forms = method_class(method).needs.sharing
    if text == "ind":
        return method, "branch"
    if len(forms) > 1:
        raise UserError(f"{text} has two forms: name one, {text}-branch or {text}-network")
    return method, forms[0]


def _known_method(name: str) -> str:
    if name not in list_methods():
        raise unknown_name("method", name, list_methods())
    return name


def _published(name: str, method: str, sharing: str, model: str, dataset: str) -> Recipe:
    """The paper's settings for this data set, then the method's own."""
    base = _on_dataset(name, method, sharing, model, dataset)
    if method in ("baseline", "ind"):
        base = dataclasses.replace(base, ramp_epochs=0.0)
    if method == "baseline":
        base = dataclasses.replace(base, students=1)
    if method == "ffsd":
        base = _ffsd(base)
    return base


def _ffsd(base: Recipe) -> Recipe:
    """FFSD's settings: the ramp counts epochs from 1 and warms the map losses alone."""
    imagenet = base.dataset == "imagenet"
    base = dataclasses.replace(
        base,
        students=3,
        weight_decay=1e-4,
        ramp_epochs=5 * base.epochs / (90 if imagenet else 300),
        ramp_first=1,
        crop_mode="reflect",
    )
    if imagenet:
        base = dataclasses.replace(base, milestones=(30, 60, 80), warmup_epochs=5.0)
    return base


def _on_dataset(name: str, method: str, sharing: str, model: str, dataset: str) -> Recipe:
    """OKDDip's CIFAR settings; the small sets shortened to what they need."""
    cifar = Recipe(name, method, model, dataset, sharing, students=4)
    if dataset == "digits":
        # Mirrored digits are other digits, and 500 images make 8 batches of 64.
        return dataclasses.replace(
            cifar, epochs=60, milestones=(30, 45), ramp_epochs=16.0, batch_size=64, flip=False
        )
    if dataset == "fashion_mnist":
        return dataclasses.replace(cifar, epochs=20, milestones=(10, 15), ramp_epochs=20 * 80 / 300)
    return cifar


def list_recipes() -> list[str]:
    """The recipes with a name of their own: the papers' cells and the demo's."""
    cifar = [
        f"{method}/{model}/{dataset}"
        for dataset in ("cifar10", "cifar100")
        for model in ("resnet32",)
        for method in ("baseline", "ind", "okddip-network", "okddip-branch")
    ]
    return [*cifar, "okddip-branch/resnet8/digits", "baseline/resnet8/digits"]
