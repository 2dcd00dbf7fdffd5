"""One format each: writes the student's file, and reads it back with the library it is for.

The same student gives the same bytes: nothing in a file says when or where it was written.
A reader gives a function from normalised images ``[B, 3, H, W]`` to logits ``[B, C]``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.models import Student
from fastokd.student_file import Weights, read_weights

Classifier = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """``write`` leaves the file in a folder and names it; ``read`` loads it by its own library."""

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


def _how_safetensors(weights: Weights, name: str) -> str:
    return f'safetensors.torch.load_file("{name}")'


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

    arch = foreign_name(weights, "torchvision")
    options = {key: value for key, value in weights.options.items() if key not in OURS}
    plain = {"aux_logits": False} if arch in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet's initial weights
        net: nn.Module = models.get_model(
            arch, weights=None, num_classes=num_classes(weights), **plain, **options
        )
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def _how_torchvision(weights: Weights, name: str) -> str:
    arch = foreign_name(weights, "torchvision")
    return (
        f"torchvision.models.{arch}(num_classes={num_classes(weights)})"
        f'.load_state_dict(torch.load("{name}"))'
    )


def _write_timm(weights: Weights, student: Student, folder: Path) -> str:
    foreign_name(weights, "timm")
    return write_safetensors(weights, student, folder)


def _read_timm(weights: Weights, path: Path) -> Classifier:
    import timm

    options = {key: value for key, value in weights.options.items() if key not in OURS}
    net: nn.Module = timm.create_model(
        foreign_name(weights, "timm"),
        num_classes=num_classes(weights),
        checkpoint_path=str(path),
        **options,
    )
    return net.eval()


def _how_timm(weights: Weights, name: str) -> str:
    return (
        f'timm.create_model("{foreign_name(weights, "timm")}", '
        f'num_classes={num_classes(weights)}, checkpoint_path="{name}")'
    )


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
    return f'torch.export.load("{name}").module()(images)'


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
    return f'onnxruntime.InferenceSession("{name}").run(["logits"], {{"images": images}})'


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
