"""The recipe of each name.

A name is ``METHOD[-FORM][-VARIANT][-ensemble][@S]/MODEL/DATASET[@STYLE]``:

- METHOD as in ``fastokd list methods``; an ablation is a method: ``okddip_mean``.
- FORM is ``branch`` or ``network``. It may be left out if the method has one form or was
  published in one: ``ind`` and ``cl_ilr`` are branches, ``dml``, ``kd`` and ``kdcl`` networks.
- ``-ensemble`` reports the accuracy of the peers' mean logits (Table 4).
- A published variant of a method is another word: ``mcl-logits``, ``mcl-okd``, and ``dist``'s teachers on
  ImageNet, ``dist-resnet50``, ``dist-resnet101``, ``dist-resnet152``.
- ``@S`` trains S networks, leader included (Figure 3): ``okddip-branch@8/resnet32/cifar100``.
- ``@STYLE`` after the data set trains in a published style: ``okddip-network/resnet18/imagenet@a3``.
- MODEL is a student, or one for each of a mixed cohort, the leader's last:
  ``okddip-network/resnet20+resnet32+resnet20/cifar100``.
- DATASET may say where a set is, of those that are named by their format: ``baseline/resnet18/hf:PATH``
  (saved by Hugging Face's ``datasets``), ``wds:PATH`` (WebDataset's shards).

Methods, models and data sets compose freely; ``list_recipes`` names those that the papers report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastokd.errors import UserError, unknown_name, wrong_type
from fastokd.known import DATASETS, METHODS, place_of
from fastokd.recipe import file
from fastokd.recipe.cells import published_recipes
from fastokd.recipe.changes import changed_fields
from fastokd.recipe.newer import SETTINGS, VARIANTS
from fastokd.recipe.recipe import Recipe, checked, methods, models
from fastokd.recipe.recipe import settings as fields
from fastokd.recipe.styles import STYLES, styled
from fastokd.recipe.unused import refuse_unused

# The published form of methods that have two.
PUBLISHED_FORM = {
    "ind": "branch",
    **dict.fromkeys(("dml", "kd", "kdcl", "mcl", "dkd", "dist"), "network"),
}
# Methods published without a ramp of the distillation weight.
UNRAMPED = ("baseline", "ind", "dml", "kd", "kdcl", "mcl", "okdph", "dkd", "dist")
TEMPERATURE = 3.0


class _Name(NamedTuple):
    """The fields of a recipe's name."""

    method: str
    sharing: str
    ensemble: bool
    students: int | None
    model: str
    dataset: str
    style: str | None
    variant: str | None


def recipe(name: str, /, **changes: Any) -> Recipe:
    """The recipe called ``name`` or in the file ``name``, ``FILE.toml``, with settings replaced.

    ``epochs`` scales the schedule (:meth:`Recipe.with_epochs`) unless ``milestones`` come with it; an
    option of the method or of the students is given by its name, or within ``method_options`` or
    ``model_options``; ``method`` replaces the named method and keeps its form, as for one of
    :func:`fastokd.methods.register_method`.

    Raises:
        UserError: an unknown method, model, data set or form (the nearest names are offered); a
            setting that the recipe, its method and its students don't have; a value of the wrong
            type; two values for one setting.
    """
    if not isinstance(name, str):
        raise wrong_type("the recipe", name, "a name, METHOD/MODEL/DATASET")
    if file.is_file(name):
        base_name, settings_of_file = file.read_recipe(name)
        return _changed(recipe(base_name, **settings_of_file), changes)
    parsed = _parse(name)
    if parsed.students not in (None, changes.get("students", parsed.students)):
        raise UserError(
            f"students is {changes['students']}, but {name} names {parsed.students}: leave one of "
            "them out"
        )
    method = changes.pop("method", None)
    if method is not None:
        parsed = parsed._replace(method=checked("method", method), variant=None)
        style = "" if parsed.style is None else f"@{parsed.style}"
        name = f"{method}-{parsed.sharing}/{parsed.model}/{parsed.dataset}{style}"
    return _changed(_published(name, parsed), changes)


def _changed(base: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``base`` with settings replaced; new epochs scale the schedule."""
    changes = changed_fields(base, settings)
    epochs = changes.pop("epochs", None)
    if epochs is not None:
        fields()["epochs"].check("epochs", epochs)
        base = base.with_epochs(epochs)
    changed = dataclasses.replace(base, **changes)
    # A file says every field, those that mean nothing at their defaults.
    refuse_unused(changed, {n for n in changes if getattr(changed, n) != getattr(base, n)})
    return changed


def _parse(name: str) -> _Name:
    parts = name.split("/", 2)
    if len(parts) != 3 or ("/" in parts[2] and not place_of(parts[2])[1]):
        raise UserError(
            f"{name!r} is no recipe: name one as METHOD/MODEL/DATASET, "
            "such as okddip-branch/resnet32/cifar100"
        )
    text, model, dataset = parts
    dataset, style = _of_style(dataset)
    for student in model.split("+"):
        models.model_spec(student)
    if place_of(dataset)[0] not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    text, at, count = text.partition("@")
    if at and not count.isdecimal():
        raise UserError(f"{name!r} asks for {count!r} students: write a number after the @")
    method, *words = text.split("-")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    ensemble = "ensemble" in words
    variant = next((word for word in words if word in VARIANTS.get(method, {})), None)
    forms = [word for word in words if word not in ("ensemble", variant)]
    if len(forms) > 1 or not {*forms} <= {"branch", "network"}:
        raise UserError(
            f"{method} has no form {'-'.join(forms)!r}: write {method}-branch or {method}-network; add "
            "-ensemble to report the ensemble's accuracy"
        )
    sharing = forms[0] if forms else _only_form(method)
    number = int(count) if at else None
    return _Name(method, sharing, ensemble, number, model, dataset, style, variant)


def _of_style(dataset: str) -> tuple[str, str | None]:
    """The data set and the style of ``DATASET@STYLE``; a folder's path may have an @, too."""
    before, at, style = dataset.rpartition("@")
    if not at or (style not in STYLES and place_of(dataset)[1]):
        return dataset, None
    return before, style


def _only_form(method: str) -> str:
    forms = methods.method_class(method).needs.sharing
    if method in PUBLISHED_FORM:
        return PUBLISHED_FORM[method]
    if len(forms) > 1:
        raise UserError(f"{method} has two forms: name one, {method}-branch or {method}-network")
    return forms[0]


def _published(text: str, name: _Name) -> Recipe:
    """The published recipe: settings of the data set, the student, the method and the report."""
    students = name.students
    if students is None:
        mixed = name.model.count("+") + 1
        students = mixed if mixed > 1 else _students(name.method, name.sharing)
    base = _on_dataset(
        Recipe(
            text,
            name.method,
            name.model,
            name.dataset,
            name.sharing,
            students,
            method_options=_method_options(name.method),
            model_options=_model_options(name),
            reported="leader" if methods.method_class(name.method).needs.leader else "mean",
        )
    )
    if name.method in UNRAMPED:
        base = dataclasses.replace(base, ramp_epochs=0.0)
    if methods.method_class(name.method).needs.teacher:
        teacher = "resnet34" if name.dataset == "imagenet" else "resnet110"
        base = dataclasses.replace(base, teacher=f"baseline/{teacher}/{name.dataset}")
    if name.method == "ffsd":
        base = _ffsd(base)
    if name.method in SETTINGS:
        base = SETTINGS[name.method](base)
    if name.variant is not None:
        base = VARIANTS[name.method][name.variant](base)
    if name.method == "okddip_no_two_level":
        base = dataclasses.replace(base, reported="kept")
    if name.ensemble:
        base = dataclasses.replace(base, reported="ensemble_logits")
    return base if name.style is None else styled(base, name.style)


def _students(method: str, sharing: str) -> int:
    """The number of networks, leader included: 4 in all of OKDDip's tables."""
    if (method, sharing) == ("mcl", "network"):
        return 2
    alone = dict.fromkeys(("baseline", "kd", "dkd", "dist"), 1)
    return {**alone, "okdph": 2, "ffsd": 3, "pcl": 3}.get(method, 4)


def _method_options(method: str) -> dict[str, Any]:
    """The papers' options, explicit so that ``recipe.json`` contains them."""
    options: dict[str, Any] = {}
    if "temperature" in methods.option_defaults(method):
        options["temperature"] = 2.0 if method == "ffsd" else TEMPERATURE
    if method == "kdcl":
        options["target"] = "min_logit"
    return options


def _model_options(name: _Name) -> dict[str, Any]:
    """The options that differ in the branch form: VGG's dropout."""
    if name.sharing == "network" or "+" in name.model:
        return {}
    return dict(models.model_spec(name.model).branch_options)


def _ffsd(base: Recipe) -> Recipe:
    """FFSD's settings. Its ramp counts epochs from 1 and weighs only the map losses."""
    imagenet = base.dataset == "imagenet"
    base = dataclasses.replace(
        base,
        weight_decay=1e-4,
        ramp_epochs=5 * base.epochs / (90 if imagenet else 300),
        ramp_first=1,
    )
    if imagenet:
        return dataclasses.replace(base, milestones=(30, 60, 80), warmup_epochs=5.0)
    return dataclasses.replace(base, crop_mode="reflect")


def _on_dataset(cifar: Recipe) -> Recipe:
    """OKDDip's settings on CIFAR and ImageNet; shorter schedules for the small sets. Sets that it doesn't
    report have the settings of published code that trains single networks on them, with CIFAR's ramp in proportion
    to the epochs."""
    if cifar.dataset == "imagenet":
        # The paper gives no R for ImageNet; 24 of 90 epochs is the fraction of CIFAR's.
        return dataclasses.replace(
            cifar,
            epochs=90,
            batch_size=256,
            weight_decay=1e-4,
            milestones=(30, 60),
            ramp_epochs=24.0,
            crop_padding=0,
            resized_crop=True,
            image_size=224,
            eval_resize=256,
        )
    if cifar.dataset == "digits":
        # A mirrored digit is not that digit; 500 images give 8 batches of 64.
        return dataclasses.replace(
            cifar,
            epochs=60,
            milestones=(30, 45),
            ramp_epochs=16.0,
            batch_size=64,
            crop_padding=2,
            flip=False,
        )
    if cifar.dataset == "glyphs":
        # A mirrored letter is not that letter.
        return dataclasses.replace(
            cifar,
            epochs=40,
            milestones=(20, 30),
            ramp_epochs=40 * 80 / 300,
            crop_padding=2,
            flip=False,
        )
    if cifar.dataset == "svhn":
        # Cutout's code (uoguelph-mlrg/Cutout, train.py, for SVHN), without cutout and the extra images.
        return dataclasses.replace(
            cifar,
            epochs=160,
            lr=0.01,
            milestones=(80, 120),
            ramp_epochs=160 * 80 / 300,
            crop_padding=0,
            flip=False,
        )
    if cifar.dataset == "stl10":
        # SESN's code (ISosnovik/sesn, experiments_stl.sh and utils/loaders.py), without cutout.
        return dataclasses.replace(
            cifar,
            epochs=1000,
            milestones=(300, 400, 600, 800),
            lr_decay=0.2,
            ramp_epochs=1000 * 80 / 300,
            crop_padding=12,
            image_size=96,
        )
    if cifar.dataset == "tiny_imagenet":
        # CIFAR's settings; the padding is an eighth of the side, too.
        return dataclasses.replace(cifar, crop_padding=8, image_size=64)
    if cifar.dataset == "fashion_mnist":
        return dataclasses.replace(cifar, epochs=20, milestones=(10, 15), ramp_epochs=20 * 80 / 300)
    return cifar


def list_recipes() -> list[str]:
    """The recipes of the papers' tables and of the demo."""
    demo = ["baseline/resnet8/digits", "okddip-branch/resnet8/digits"]
    return list(dict.fromkeys([*published_recipes(), *demo]))


__all__ = ["Recipe", "list_recipes", "recipe"]
