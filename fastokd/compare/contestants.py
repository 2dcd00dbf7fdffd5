"""Who takes part in a comparison: the methods, and students alone to compare them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import nn

from fastokd.compare.cost import larger_student, training_macs
from fastokd.compare.shared import SHARED, own_settings, settings_of
from fastokd.data import DatasetSplits
from fastokd.errors import UserError, unknown_name
from fastokd.known import METHODS, list_methods
from fastokd.methods import method_class
from fastokd.methods import option_defaults as method_options
from fastokd.models import option_defaults as model_options
from fastokd.recipe.cells import DEFAULT_SIZE
from fastokd.recipe.changes import NAMED
from fastokd.recipe.names import PUBLISHED_FORM, Recipe, recipe
from fastokd.recipe.recipe import settings as recipe_settings
from fastokd.student.teacher import build_teachers, find_teachers, teacher_recipe

ALONE = "one student"
Kind = Literal["alone", "method", "longer", "larger", "teacher"]


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        methods: names, ``method[-form]``, joined by commas, or ``all``.
        settings: of every recipe; options of a method go to the methods that have them.
        students: of each cohort, the leader included; None for 4.
        label_noise, fraction: further conditions beside the whole training set with its own labels.
        published: each method trains with its own published optimizer, schedule and augmentation.
        recipe: name or file of a recipe whose shared settings are those of all (``shared.py``); None for the
            data set's.
        budget: ``"images"`` (equal images seen), ``"macs"`` (equal multiply-accumulates, too).
        teacher: trained teachers; else the comparison trains the recipe's.
    """

    methods: str
    model: str
    dataset: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    students: int | None = None
    label_noise: tuple[float, ...] = ()
    fraction: tuple[float, ...] = ()
    published: bool = False
    recipe: str | None = None
    budget: str = "macs"
    teacher: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("--seeds is empty: give whole numbers, such as 0,1,2")
        for name, values in (("seeds", self.seeds), ("label-noise", self.label_noise), ("fraction", self.fraction)):  # fmt: skip
            twice = [value for value in values if list(values).count(value) > 1]
            if twice:
                raise UserError(f"--{name} has {twice[0]} twice: leave one of them out")
        if "+" in self.model:
            raise UserError(
                f"--model is {self.model}, a mixed cohort: a comparison has equal students, name one"
            )
        if self.recipe is not None and self.published:
            raise UserError(
                "--recipe gives all methods the same settings, and --published each its own: leave one out"
            )
        if self.budget not in ("images", "macs"):
            raise UserError(f"--budget is {self.budget!r}: choose images or macs")


@dataclass(frozen=True)
class Contestant:
    """A row of the comparison.

    Attributes:
        recipe: for the whole training set; conditions and seeds change it.
        macs: multiply-accumulates of one training image (:func:`training_macs`).
        equal: of a method, the label of the student alone that spends as many.
        taught_by: the label of the teacher that the comparison trains.
    """

    label: str
    kind: Kind
    recipe: Recipe
    macs: int
    equal: str | None = None
    taught_by: str | None = None

    @property
    def spent(self) -> float:
        """Multiply-accumulates for each image of the training set, over all epochs."""
        return float(self.macs * self.recipe.epochs)


def contestants(asked: Request, data: DatasetSplits) -> tuple[list[Contestant], list[str]]:
    """The rows in order: the student alone, the methods, the students alone of their cost, teachers;
    and notes on what was left out.

    Raises:
        UserError: an unknown method, a form that it lacks, a setting that nobody has, images held out
            that a method needs and the data lack; errors of :func:`fastokd.recipe`.
    """
    classes = data.num_classes
    notes: list[str] = []
    shared = settings_of(asked.recipe, asked.settings)
    base = recipe(f"baseline/{asked.model}/{asked.dataset}", **_for("baseline", asked))
    base = dataclasses.replace(base, **shared)
    alone = Contestant(ALONE, "alone", base, training_macs(base, classes))
    found: list[Contestant] = []
    teachers: dict[str, Contestant] = {}
    for name, explicit in _names(asked):
        try:
            made = dataclasses.replace(_method(name, asked, base, data), **shared)
            given, teacher = _teachers(made, asked, base, data, shared)
            macs = training_macs(made, classes, given)
        except UserError as error:
            if explicit:
                raise
            notes.append(f"{name} is left out: {error}.")
            continue
        if teacher is not None:
            teachers.setdefault(teacher.label, teacher)
        label = None if teacher is None else teacher.label
        found.append(Contestant(name, "method", made, macs, taught_by=label))
    if not found:
        raise UserError("METHODS names no method beside the baseline: name at least one")
    if asked.teacher and not any(method_class(one.recipe.method).needs.teacher for one in found):
        raise UserError("--teacher is given, but no method here learns from one: leave it out")
    _refuse_unknown(asked, [one.recipe for one in found])
    extra: list[Contestant] = []
    if asked.budget == "macs":
        found, extra = _of_equal_cost(found, alone)
        times = max(one.recipe.students for one in found)
        larger = larger_student(asked.model, times, classes, base.image_size) if times > 1 else None
        if larger is not None:
            wide = recipe(
                f"baseline/{larger.model}/{asked.dataset}", **_for("baseline", asked, larger.model)
            )
            wide = dataclasses.replace(wide, **shared)
            label = f"one {larger.model}, {larger.ratio:.2g} times the MACs"
            extra.append(Contestant(label, "larger", wide, training_macs(wide, classes)))
        elif times > 1:
            notes.append(
                f"No student of the registry has about {times} times the multiply-accumulates of "
                f"{asked.model} (within a factor of 1.5), so none is compared."
            )
    return [alone, *found, *extra, *teachers.values()], notes


def _names(asked: Request) -> list[tuple[str, bool]]:
    """The names METHOD-FORM, each once, and whether it was named by the user."""
    words = [word.strip() for word in asked.methods.split(",")]
    if words == ["all"]:
        return [
            (f"{method}-{form}", False)
            for method in list_methods()
            if method != "baseline"
            for form in _forms(method)
        ]
    if "all" in words:
        raise UserError("METHODS is all and more: write all, or name methods")
    found = []
    for word in words:
        method, _, form = word.partition("-")
        if method not in METHODS:
            raise unknown_name("method", method, [*METHODS, "all"])
        if method == "baseline":
            continue  # always there
        forms = method_class(method).needs.sharing
        if form and form not in forms:
            raise UserError(f"{method} has no form {form!r}: choose {' or '.join(forms)}")
        if not form and len(_forms(method)) > 1:
            raise UserError(
                f"{method} has two forms: name one or both, {method}-branch,{method}-network"
            )
        found.append((f"{method}-{form or _forms(method)[0]}", True))
    twice = [name for name, _ in found if found.count((name, True)) > 1]
    if twice:
        raise UserError(f"{asked.methods!r} names {twice[0]} twice: leave one of them out")
    return found


def _forms(method: str) -> tuple[str, ...]:
    """The published form of a method; both where it was published in both."""
    published = PUBLISHED_FORM.get(method)
    return (published,) if published else tuple(method_class(method).needs.sharing)


def _for(method: str, asked: Request, model: str | None = None) -> dict[str, Any]:
    """The settings that a method's recipe takes."""
    others = _model_options(model or asked.model)
    own = method_options(method)
    return {
        name: value
        for name, value in own_settings(asked.recipe, asked.settings).items()
        if name in recipe_settings() or name in own or name in others
    }


@cache
def _model_options(model: str) -> frozenset[str]:
    return frozenset(model_options(model))


def _refuse_unknown(asked: Request, recipes: list[Recipe]) -> None:
    """Raises for a setting that none of the recipes has; those of the name can't be set."""
    for name in own_settings(asked.recipe, asked.settings):
        if name in NAMED or name in ("seed", "label_noise", "fraction", "students"):
            raise UserError(
                f"--set can't change {name} in a comparison: it has an option or a name"
            )
        known = [one for one in recipes if name in _for(one.method, asked)]
        if not known:
            recipe(recipes[0].name, **{name: asked.settings[name]})  # raises


def _method(name: str, asked: Request, base: Recipe, data: DatasetSplits) -> Recipe:
    """The recipe of a method, with the shared settings."""
    method = name.partition("-")[0]
    full = f"{name}/{asked.model}/{asked.dataset}"
    given = {**_for(method, asked), "epochs": base.epochs}
    if recipe(full).students > 1:
        # By the name: a method's published settings may depend on it.
        count = DEFAULT_SIZE if asked.students is None else asked.students
        full = f"{name}@{count}/{asked.model}/{asked.dataset}"
    made = recipe(full, **given)
    if method_class(method).needs.heldout and data.val is None:
        raise UserError(
            f"{method} measures the students on held-out images, and {asked.dataset} has none apart: "
            "hold some out for all, for example with --val 0.1"
        )
    if asked.published:
        return made
    return dataclasses.replace(made, **{setting: getattr(base, setting) for setting in SHARED})


def _teachers(
    made: Recipe, asked: Request, base: Recipe, data: DatasetSplits, shared: Mapping[str, Any]
) -> tuple[nn.Module | None, Contestant | None]:
    """The given teacher of a method, or the one that the comparison trains, with the shared settings."""
    if not method_class(made.method).needs.teacher:
        return None, None
    if asked.teacher:
        if any(asked.label_noise) or any(share != 1 for share in asked.fraction):
            raise UserError(
                "--teacher names a trained teacher, which has seen other images or labels than those of "
                "--label-noise and --fraction: leave --teacher out, and one is trained for each of them"
            )
        return build_teachers(find_teachers(made, asked.teacher, None), data), None
    own = own_settings(asked.recipe, asked.settings)
    settings = {name: value for name, value in own.items() if name in recipe_settings()}
    taught_by = recipe(teacher_recipe(made).name, **{**settings, "epochs": base.epochs})
    if not asked.published:
        same = {name: getattr(base, name) for name in SHARED}
        taught_by = dataclasses.replace(taught_by, **{**same, **shared})
    macs = training_macs(taught_by, data.num_classes)
    return None, Contestant(f"teacher {taught_by.model}", "teacher", taught_by, macs)


def _of_equal_cost(
    methods: list[Contestant], alone: Contestant
) -> tuple[list[Contestant], list[Contestant]]:
    """The methods, each with the label of a student alone that trains for as many epochs as it takes to
    spend the same multiply-accumulates; and these students, each once."""
    longer: dict[int, Contestant] = {alone.recipe.epochs: alone}
    found = []
    for one in methods:
        # To three digits, as the label says: budgets nearer than that share one student.
        times = float(f"{one.spent / alone.spent:.3g}")
        epochs = max(1, round(times * alone.recipe.epochs))
        if epochs not in longer:
            more = alone.recipe.with_epochs(epochs)
            label = f"{ALONE}, {epochs / alone.recipe.epochs:.3g} times the epochs"
            longer[epochs] = Contestant(label, "longer", more, alone.macs)
        found.append(dataclasses.replace(one, equal=longer[epochs].label))
    return found, [one for epochs, one in sorted(longer.items()) if one is not alone]
