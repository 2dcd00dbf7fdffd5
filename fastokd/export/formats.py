"""One format each: writes the student's file, and reads it back with the library it is for.

The same student gives the same bytes: nothing in a file says when or where it was written.
A reader gives a function from normalised images ``[B, 3, H, W]`` to logits ``[B, C]``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from keyword import iskeyword
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.models import Student
from fastokd.models.libraries import WITH_AUX
from fastokd.student.file import read_weights
from fastokd.student.weights import Weights

Classifier = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """``write`` leaves the file in a folder and names it; ``read`` loads it by its own library;
    ``how`` is Python that does so, in one line, and names it ``model``."""

    write: Callable[[Weights, Student, Path], str]
    read: Callable[[Weights, Path], Classifier]
    how: Callable[[Weights, str], str]


def plain_state(weights: Weights, student: Student) -> dict[str, Tensor]:
    """The weights under the keys of whoever published the network."""
    return {student.published_key(key): value.contiguous() for key, value in weights.state.items()}


def foreign_name(weights: Weights, library: str) -> str:
    """The student's name in torchvision or timm.

    Raises:
        UserError: that library doesn't have the network.
    """
    prefix, _, name = weights.model.rpartition(":")
    if prefix == library or (not prefix and name in ("resnet18", "resnet34")):
        return name
    raise UserError(
        f"{weights.model} is no network of {library}: export it to safetensors, onnx, "
        "torch-export or hub"
    )


def num_classes(weights: Weights) -> int:
    """C."""
    return len(weights.fact("class_names"))


def arguments(weights: Weights, library: str) -> dict[str, Any]:
    """By which ``library``, or fastokd, makes this network without its weights."""
    if library == "fastokd":
        return {"num_classes": num_classes(weights), **weights.options}
    options = {key: value for key, value in weights.options.items() if key not in OURS}
    aux = library == "torchvision" and foreign_name(weights, library) in WITH_AUX
    plain = {"aux_logits": False, "init_weights": False} if aux else {}
    return {"num_classes": num_classes(weights), **plain, **options}


def call(function: str, name: str, options: Mapping[str, Any]) -> str:
    """Python that calls ``function`` with a name and options, whatever is in them."""
    plain = [f"{k}={v!r}" for k, v in options.items() if k.isidentifier() and not iskeyword(k)]
    other = {k: v for k, v in options.items() if not k.isidentifier() or iskeyword(k)}
    return f"{function}({', '.join([repr(name), *plain, *([f'**{other!r}'] if other else [])])})"


def _file_name(weights: Weights, suffix: str) -> str:
    return weights.model.replace(":", "-").replace("/", "-") + suffix


def write_safetensors(weights: Weights, student: Student, folder: Path) -> str:
    """The student alone, with what it says of itself."""
    name = _file_name(weights, ".safetensors")
    plain = replace(weights, state=plain_state(weights, student))
    write_durably(folder / name, plain.to_bytes())
    return name


def read_safetensors(weights: Weights, path: Path) -> Classifier:
    """The network of our own registry with the weights of a file."""
    del weights
    return read_weights(path).build()


def statements(weights: Weights, name: str) -> list[str]:
    """Python that makes fastokd's network with the weights of a file."""
    made = call("fastokd.models.create_model", weights.model, arguments(weights, "fastokd"))
    # A file has the keys of the library that published the network.
    net = "model.net" if ":" in weights.model else "model"
    return [
        "import fastokd.models, safetensors.torch",
        f"model = {made}.eval()",
        f"{net}.load_state_dict(safetensors.torch.load_file({name!r}))",
    ]


def _how_safetensors(weights: Weights, name: str) -> str:
    return "; ".join(statements(weights, name))


def _write_torchvision(weights: Weights, student: Student, folder: Path) -> str:
    foreign_name(weights, "torchvision")
    name = _file_name(weights, ".pth")
    # By way of memory: torch's own writer ends the process where the disk is full.
    file = io.BytesIO()
    torch.save(plain_state(weights, student), file)
    write_durably(folder / name, file.getvalue())
    return name


def _read_torchvision(weights: Weights, path: Path) -> Classifier:
    from torchvision import models

    net: nn.Module = models.get_model(
        foreign_name(weights, "torchvision"), weights=None, **arguments(weights, "torchvision")
    )
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def _how_torchvision(weights: Weights, name: str) -> str:
    arch = foreign_name(weights, "torchvision")
    made = call("torchvision.models.get_model", arch, arguments(weights, "torchvision"))
    return (
        f"import torch, torchvision; model = {made}.eval(); "
        f"model.load_state_dict(torch.load({name!r}))"
    )


def _write_timm(weights: Weights, student: Student, folder: Path) -> str:
    foreign_name(weights, "timm")
    return write_safetensors(weights, student, folder)


def _read_timm(weights: Weights, path: Path) -> Classifier:
    import timm

    net: nn.Module = timm.create_model(
        foreign_name(weights, "timm"), checkpoint_path=str(path), **arguments(weights, "timm")
    )
    return net.eval()


def _how_timm(weights: Weights, name: str) -> str:
    options = {**arguments(weights, "timm"), "checkpoint_path": name}
    made = call("timm.create_model", foreign_name(weights, "timm"), options)
    return f"import timm; model = {made}.eval()"


class _Logits(nn.Module):
    """The student's logits alone, for what traces a module's ``forward``."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits_BC: Tensor = self.student.outputs(images).logits_BC
        return logits_BC


def _example(weights: Weights) -> tuple[Tensor, dict[str, dict[int, torch.export.Dim]]]:
    """Two images, and that their number is free."""
    size = weights.preprocessing.input_size
    return torch.zeros(2, 3, size, size), {"images": {0: torch.export.Dim("batch")}}


def _write_torch_export(weights: Weights, student: Student, folder: Path) -> str:
    images, free = _example(weights)
    name = _file_name(weights, ".pt2")
    program = torch.export.export(_Logits(student), (images,), dynamic_shapes=free)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of source files
    file = io.BytesIO()
    torch.export.save(program, file)
    write_durably(folder / name, file.getvalue())
    return name


def _read_torch_export(weights: Weights, path: Path) -> Classifier:
    del weights
    with warnings.catch_warnings():
        # torch 2.11 maps the file's bytes, which it only reads.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(path).module()


def _how_torch_export(weights: Weights, name: str) -> str:
    del weights
    return f"import torch; model = torch.export.load({name!r}).module()"


def _write_onnx(weights: Weights, student: Student, folder: Path) -> str:
    import onnx

    images, free = _example(weights)
    name = _file_name(weights, ".onnx")
    with warnings.catch_warnings():
        # The exporter's own, about its own future.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(student),
            (images,),
            folder / name,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=free,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    model = onnx.load(folder / name)
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]  # source files with their paths
    write_durably(folder / name, model.SerializeToString(deterministic=True))
    return name


def _read_onnx(weights: Weights, path: Path) -> Classifier:
    import onnxruntime

    del weights
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _how_onnx(weights: Weights, name: str) -> str:
    del weights
    return (
        f"import onnxruntime; model = onnxruntime.InferenceSession({name!r})"
        "  # model.run(['logits'], {'images': images})"
    )


# What a model's options hold that its library doesn't know.
OURS = ("split_at", "input_size")
SINGLE_FILES: dict[str, Format] = {
    "safetensors": Format(write_safetensors, read_safetensors, _how_safetensors),
    "torchvision": Format(_write_torchvision, _read_torchvision, _how_torchvision),
    "timm": Format(_write_timm, _read_timm, _how_timm),
    "onnx": Format(_write_onnx, _read_onnx, _how_onnx),
    "torch-export": Format(_write_torch_export, _read_torch_export, _how_torch_export),
}
# What a format needs beside the package itself, by its import name.
NEEDS = {"timm": ("timm",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
