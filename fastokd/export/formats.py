"""The export formats: each writes the student's file and reads it with the library it is for.

The same student gives the same bytes: a file has neither time nor path. A reader returns a function
from the network's input, normalised images ``[B, 3, H, W]`` or pixels, to logits ``[B, C]``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from keyword import iskeyword
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.export.classify import BESIDE, OF_TORCH
from fastokd.models import Student
from fastokd.models.libraries import WITH_AUX
from fastokd.student.file import read_weights
from fastokd.student.weights import Weights

Classifier = Callable[[Tensor], Tensor]
About = dict[str, Any]


class Format(NamedTuple):
    """A file format.

    ``file``: the file's name, where ``{model}`` is the student's. ``write(weights, student, path,
    about)`` writes the file, and what belongs beside it; ``about`` is the export's ``student.json``.
    ``read(weights, path)`` loads it with the format's own library. ``how(weights)``: the Python
    statements that load the path ``file`` as ``model``, and its ``student.json`` as ``about``.
    ``needs``: the packages that the format needs, by their import names. ``run``: the lines of
    ``classify.py`` that compute a picture's logits. ``pixels``: the network takes uint8 images
    ``[B, H, W, 3]`` and normalises them. ``int8``: what is written and checked is then quantised
    (:mod:`fastokd.export.int8`).
    """

    file: str
    write: Callable[[Weights, Student, Path, About], None]
    read: Callable[[Weights, Path], Classifier]
    how: Callable[[Weights], list[str]]
    needs: tuple[str, ...] = ()
    run: str = OF_TORCH
    pixels: bool = False
    int8: bool = False


def plain_state(weights: Weights, student: Student) -> dict[str, Tensor]:
    """The weights under the keys of the library that published the network."""
    return {student.published_key(key): value.contiguous() for key, value in weights.state.items()}


def foreign_name(weights: Weights, library: str) -> str:
    """The student's name in torchvision or timm.

    Raises:
        UserError: that library doesn't have the network.
    """
    prefix, _, name = weights.model.rpartition(":")
    if prefix == library or (not prefix and name in PUBLISHED):
        return name
    if prefix:
        where = f"{weights.model} is a network of {prefix}, and not of {library}"
    else:
        where = f"{weights.model} exists only in fastokd, and not in {library}"
    own = [prefix] if prefix else []
    *others, last = [*own, "onnx", "torch-export", "safetensors", "hub"]
    raise UserError(f"{where}: export it to {', '.join(others)} or {last}")


def arguments(weights: Weights, library: str) -> dict[str, Any]:
    """The arguments by which ``library`` (or fastokd) makes this network without its weights."""
    classes = len(weights.fact("class_names"))
    if library == "fastokd":
        return {"num_classes": classes, **weights.options}
    options = {key: value for key, value in weights.options.items() if key not in OURS}
    aux = library == "torchvision" and foreign_name(weights, library) in WITH_AUX
    plain = {"aux_logits": False, "init_weights": False} if aux else {}
    return {"num_classes": classes, **plain, **options}


def call(function: str, name: str, options: Mapping[str, Any]) -> str:
    """Python that calls ``function`` with a name and any options."""
    return call_with(function, repr(name), options=options)


def call_with(function: str, *written: str, options: Mapping[str, Any]) -> str:
    """Python that calls ``function`` with arguments that are Python themselves, and any options."""
    plain = [f"{k}={v!r}" for k, v in options.items() if k.isidentifier() and not iskeyword(k)]
    other = {k: v for k, v in options.items() if not k.isidentifier() or iskeyword(k)}
    return f"{function}({', '.join([*written, *plain, *([f'**{other!r}'] if other else [])])})"


def write_safetensors(weights: Weights, student: Student, path: Path, _: About) -> None:
    """The student alone, with its facts."""
    write_durably(path, replace(weights, state=plain_state(weights, student)).to_bytes())


def read_safetensors(_: Weights, path: Path) -> Classifier:
    """Our own network, with the weights of a file."""
    return read_weights(path).build()


def statements(weights: Weights) -> list[str]:
    """Python statements that make our own network with the weights of a file."""
    made = call("fastokd.models.create_model", weights.model, arguments(weights, "fastokd"))
    # A file has the keys of the library that published the network.
    net = "model.net" if ":" in weights.model else "model"
    return [
        "import fastokd.models",
        "import safetensors.torch",
        "import torch",
        f"model = {made}.eval()",
        f"{net}.load_state_dict(safetensors.torch.load_file(file))",
        BESIDE,
    ]


def _write_torchvision(weights: Weights, student: Student, path: Path, _: About) -> None:
    # Through memory: torch's own writer ends the process if the disk is full.
    file = io.BytesIO()
    torch.save(plain_state(weights, student), file)
    write_durably(path, file.getvalue())


def _read_torchvision(weights: Weights, path: Path) -> Classifier:
    from torchvision import models

    name = foreign_name(weights, "torchvision")
    net: nn.Module = models.get_model(name, weights=None, **arguments(weights, "torchvision"))
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def _how_torchvision(weights: Weights) -> list[str]:
    arch = foreign_name(weights, "torchvision")
    made = call("torchvision.models.get_model", arch, arguments(weights, "torchvision"))
    load = "model.load_state_dict(torch.load(file))"
    return ["import torch", "import torchvision", f"model = {made}.eval()", load, BESIDE]


def _read_timm(weights: Weights, path: Path) -> Classifier:
    import timm

    name, options = foreign_name(weights, "timm"), arguments(weights, "timm")
    net: nn.Module = timm.create_model(name, checkpoint_path=str(path), **options)
    return net.eval()


def _how_timm(weights: Weights) -> list[str]:
    name = repr(foreign_name(weights, "timm"))
    options = arguments(weights, "timm")
    made = call_with("timm.create_model", name, "checkpoint_path=str(file)", options=options)
    return ["import timm", "import torch", f"model = {made}.eval()", BESIDE]


# A model's options that its library doesn't know.
OURS = ("split_at", "input_size")
# The own students whose keys and numbers are torchvision's and timm's.
PUBLISHED = ("resnet18", "resnet34")
PLAIN: dict[str, Format] = {
    "safetensors": Format("{model}.safetensors", write_safetensors, read_safetensors, statements),
    "torchvision": Format("{model}.pth", _write_torchvision, _read_torchvision, _how_torchvision),
    "timm": Format(
        "{model}.safetensors", write_safetensors, _read_timm, _how_timm, needs=("timm",)
    ),
}
