"""Reads a teacher: of fastokd, or a classifier of torchvision or timm with its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fastokd.data.preprocessing import KNOWN
from fastokd.errors import UserError
from fastokd.models.libraries import LIBRARIES
from fastokd.models.pretrained import imagenet_classes, installed, published
from fastokd.student.file import read_weights
from fastokd.student.init import classifier_of, fitting, read_one
from fastokd.student.torch_file import refuse_what_is_none
from fastokd.student.weights import Weights

# The fact of weights that don't name their classes: how many there are.
CLASSES = "num_classes"
# Exports whose graph would have to be run as it is.
GRAPHS = (".pt2", ".onnx", ".pt", ".torchscript")


def names_of(given: Sequence[str]) -> list[str]:
    """Each teacher in ``given``, whose entries may be joined by ``+``; an existing file is one."""
    return [
        name
        for entry in given
        for name in ([entry] if _is_one(entry) else entry.split("+"))
        if name
    ]


def _is_one(entry: str) -> bool:
    model, _, file = entry.partition("=")
    return Path(entry).exists() or (bool(file) and "+" not in model and Path(file).exists())


def is_of_a_library(name: str) -> bool:
    """Whether ``name`` is ``torchvision:NAME`` or ``timm:NAME``, with or without ``=FILE``."""
    return name.partition(":")[0] in LIBRARIES and not Path(name).exists()


def file_of(name: str) -> Path | None:
    """The file or folder of a teacher; None for a library's weights that aren't installed."""
    if not is_of_a_library(name):
        return Path(name)
    model, has_file, file = name.partition("=")
    return Path(file) if has_file else installed(model)


def read_teacher(name: str) -> Weights:
    """A run, a checkpoint, a ``student.safetensors``, or ``torchvision:NAME=FILE``, ``timm:NAME=FILE``;
    without ``=FILE`` the weights that the library has in its cache.

    A library's network has the library's mean, deviation and input size, and ImageNet's classes if it
    has 1,000. For another number they are unknown, and the metadata have only :data:`CLASSES`.

    Raises:
        UserError: it can't be read, or isn't that network.
    """
    if not is_of_a_library(name):
        path = Path(name)
        if path.suffix in GRAPHS and path.is_file():
            refuse_what_is_none(path)
            raise UserError(
                f"the teacher {path} is a graph, which could run code: export it with `--to safetensors`, "
                f"or name its weights as torchvision:NAME=FILE or timm:NAME=FILE"
            )
        return read_weights(path)
    model, has_file, _ = name.partition("=")
    path_found = file_of(name)
    if has_file and path_found == Path():
        raise UserError(f"the teacher is {name!r}: name the file of its weights after the =")
    if path_found is None:
        raise UserError(
            f"the weights of {model} aren't in the cache of {model.partition(':')[0]}, and nothing is "
            f"downloaded: name their file, --teacher {model}=FILE"
        )
    return _of_a_library(model, path_found)


def _of_a_library(model: str, path: Path) -> Weights:
    stated = published(model, path.name)
    given, _ = read_one(path, "the teacher's file")
    if (
        "class_names" in given.facts and "mean" in given.facts
    ):  # a student of fastokd, or its export
        if given.model != model:
            raise UserError(f"{path} holds a {given.model}: leave {model}= out")
        return given
    classifier = classifier_of(model, stated.classes, {})
    state, _, _ = fitting(given, model, stated.classes, {}, classifier)
    lacking = [key for key in classifier if key not in state]
    classes = stated.classes
    if lacking:  # it has other classes: of which number is its classifier's
        classes = _number_of(given, model, lacking)
        state, _, _ = fitting(given, model, classes, {}, classifier)
    if any(key not in state for key in classifier):
        raise UserError(f"{path} has no classifier of {model}: a teacher needs one")
    shown = dataclasses.replace(
        KNOWN["imagefolder"],
        input_size=stated.input_size,
        eval_resize=max(stated.eval_resize, stated.input_size),
        mean=stated.mean,
        std=stated.std,
    )
    facts = {"model": model, "model_options": "{}", **shown.to_facts()}
    names = imagenet_classes()
    known = {"class_names": json.dumps(names)} if classes == len(names) else {}
    return Weights(path, state, facts | (known or {CLASSES: json.dumps(classes)}))


def _number_of(given: Weights, model: str, classifier: Sequence[str]) -> int:
    """The number of classes in a file: the first dimension of its classifier."""
    published_keys = tuple(key.removeprefix("net.") for key in classifier)
    for key, value in given.state.items():
        if f".{key}".endswith(tuple(f".{own}" for own in published_keys)) and value.dim():
            return int(value.shape[0])
    raise UserError(f"{given.path} has no classifier of {model}: a teacher needs one")


def taken_from(weights: Weights) -> str:
    """How ``--teacher`` names these weights: by their file, after the network if the file doesn't say it."""
    is_ours = ":" not in weights.model or "student" in weights.facts
    return str(weights.path) if is_ours else f"{weights.model}={weights.path}"
