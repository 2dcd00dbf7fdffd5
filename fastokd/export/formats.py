"""The export formats: each writes the student's file and reads it with the library it is for.

The same student gives the same bytes: a file has neither time nor path. A reader returns a function
from normalised images ``[B, 3, H, W]`` to logits ``[B, C]``.
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
    """A file format.

    ``file``: the file's name, where ``{model}`` is the student's. ``write(weights, student, path)``
    writes the file, and what belongs beside it. ``read(weights, path)`` loads it with the format's own
    library. ``how(weights, name)``: the Python statements that load it as ``model``. ``needs``: the
    packages that the format needs, by their import names.
    """

    file: str
    write: Callable[[Weights, Student, Path], None]
    read: Callable[[Weights, Path], Classifier]
    how: Callable[[Weights, str], list[str]]
    needs: tuple[str, ...] = ()


def plain_state(weights: Weights, student: Student) -> dict[str, Tensor]:
    """The weights under the keys of the library that published the network."""
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
    plain = [f"{k}={v!r}" for k, v in options.items() if k.isidentifier() and not iskeyword(k)]
    other = {k: v for k, v in options.items() if not k.isidentifier() or iskeyword(k)}
    return f"{function}({', '.join([repr(name), *plain, *([f'**{other!r}'] if other else [])])})"


def write_safetensors(weights: Weights, student: Student, path: Path) -> None:
    """The student alone, with its facts."""
    write_durably(path, replace(weights, state=plain_state(weights, student)).to_bytes())


def read_safetensors(_: Weights, path: Path) -> Classifier:
    """Our own network, with the weights of a file."""
    return read_weights(path).build()


def statements(weights: Weights, name: str) -> list[str]:
    """Python statements that make our own network with the weights of a file."""
    made = call("fastokd.models.create_model", weights.model, arguments(weights, "fastokd"))
    # A file has the keys of the library that published the network.
    net = "model.net" if ":" in weights.model else "model"
    return [
        "import fastokd.models, safetensors.torch",
        f"model = {made}.eval()",
        f"{net}.load_state_dict(safetensors.torch.load_file({name!r}))",
    ]


def _write_torchvision(weights: Weights, student: Student, path: Path) -> None:
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


def _how_torchvision(weights: Weights, name: str) -> list[str]:
    arch = foreign_name(weights, "torchvision")
    made = call("torchvision.models.get_model", arch, arguments(weights, "torchvision"))
    load = f"model.load_state_dict(torch.load({name!r}))"
    return ["import torch, torchvision", f"model = {made}.eval()", load]


def _read_timm(weights: Weights, path: Path) -> Classifier:
    import timm

    name, options = foreign_name(weights, "timm"), arguments(weights, "timm")
    net: nn.Module = timm.create_model(name, checkpoint_path=str(path), **options)
    return net.eval()


def _how_timm(weights: Weights, name: str) -> list[str]:
    options = {**arguments(weights, "timm"), "checkpoint_path": name}
    made = call("timm.create_model", foreign_name(weights, "timm"), options)
    return ["import timm", f"model = {made}.eval()"]


class _Logits(nn.Module):
    """The student with logits as its only output, for tracing."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits_BC: Tensor = self.student.outputs(images).logits_BC
        return logits_BC


def _example(weights: Weights) -> tuple[Tensor, dict[str, dict[int, torch.export.Dim]]]:
    """Two images, and the declaration that the batch size is dynamic."""
    size = weights.preprocessing.input_size
    return torch.zeros(2, 3, size, size), {"images": {0: torch.export.Dim("batch")}}


def _write_torch_export(weights: Weights, student: Student, path: Path) -> None:
    images, free = _example(weights)
    program = torch.export.export(_Logits(student), (images,), dynamic_shapes=free)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # has paths of source files
    file = io.BytesIO()
    torch.export.save(program, file)
    write_durably(path, file.getvalue())


def _read_torch_export(_: Weights, path: Path) -> Classifier:
    with warnings.catch_warnings():
        # torch 2.11 maps the file's bytes and only reads them.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(path).module()


def _how_torch_export(_: Weights, name: str) -> list[str]:
    return ["import torch", f"model = torch.export.load({name!r}).module()"]


def _write_onnx(weights: Weights, student: Student, path: Path) -> None:
    import onnx

    images, free = _example(weights)
    with warnings.catch_warnings():
        # The exporter warns of its own deprecations.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(student),
            (images,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=free,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    model = onnx.load(path)
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]  # has paths of source files
    write_durably(path, model.SerializeToString(deterministic=True))


def _read_onnx(_: Weights, path: Path) -> Classifier:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _how_onnx(_: Weights, name: str) -> list[str]:
    comment = "# model.run(['logits'], {'images': images})"
    return ["import onnxruntime", f"model = onnxruntime.InferenceSession({name!r})  {comment}"]


# A model's options that its library doesn't know.
OURS = ("split_at", "input_size")
SINGLE_FILES: dict[str, Format] = {
    "safetensors": Format("{model}.safetensors", write_safetensors, read_safetensors, statements),
    "torchvision": Format("{model}.pth", _write_torchvision, _read_torchvision, _how_torchvision),
    "timm": Format(
        "{model}.safetensors", write_safetensors, _read_timm, _how_timm, needs=("timm",)
    ),
    "onnx": Format(
        "{model}.onnx",
        _write_onnx,
        _read_onnx,
        _how_onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
    ),
    "torch-export": Format(
        "{model}.pt2", _write_torch_export, _read_torch_export, _how_torch_export
    ),
}
