"""The formats that hold the network's graph: ONNX and torch.export, whose input may be pixels."""

from __future__ import annotations

import io
import json
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastokd.checkpoint import write_durably
from fastokd.export.contract import metadata
from fastokd.export.formats import About, Classifier, Format
from fastokd.models import Student
from fastokd.ops.normalize import scale_and_shift
from fastokd.student.weights import Weights

EXTRA = "student.json"


class _Logits(nn.Module):
    """The student with logits as its only output, for tracing."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits_BC: Tensor = self.student.outputs(images).logits_BC
        return logits_BC


class _LogitsOfPixels(_Logits):
    """Takes uint8 images ``[B, H, W, 3]``."""

    scale_C: Tensor
    shift_C: Tensor

    def __init__(self, student: Student, weights: Weights) -> None:
        super().__init__(student)
        scale_C, shift_C = scale_and_shift(weights.preprocessing.mean, weights.preprocessing.std)
        self.register_buffer("scale_C", scale_C)
        self.register_buffer("shift_C", shift_C)

    def forward(self, images: Tensor) -> Tensor:
        x_BHWC = images.float() * self.scale_C + self.shift_C
        return super().forward(x_BHWC.permute(0, 3, 1, 2))


def _traced(
    weights: Weights, student: Student, pixels: bool
) -> tuple[nn.Module, Tensor, dict[str, dict[int, torch.export.Dim]]]:
    """The module to trace, two images, and the declaration that the batch size is dynamic."""
    size = weights.preprocessing.input_size
    free = {"images": {0: torch.export.Dim("batch")}}
    if pixels:
        images_BHWC = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        return _LogitsOfPixels(student, weights), images_BHWC, free
    return _Logits(student), torch.zeros(2, 3, size, size), free


def _write_torch_export(
    weights: Weights, student: Student, path: Path, about: About, *, pixels: bool
) -> None:
    module, images, free = _traced(weights, student, pixels)
    program = torch.export.export(module, (images,), dynamic_shapes=free)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # has paths of source files
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={EXTRA: json.dumps(about)})
    write_durably(path, file.getvalue())


def _read_torch_export(_: Weights, path: Path) -> Classifier:
    with warnings.catch_warnings():
        # torch 2.11 maps the file's bytes and only reads them.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(path).module()


def _how_torch_export(_: Weights) -> list[str]:
    return [
        "import torch",
        f"said = {{{EXTRA!r}: ''}}",
        "model = torch.export.load(file, extra_files=said).module()",
        f"about = json.loads(said[{EXTRA!r}])",
    ]


def _write_onnx(
    weights: Weights, student: Student, path: Path, about: About, *, pixels: bool
) -> None:
    import onnx

    module, images, free = _traced(weights, student, pixels)
    with warnings.catch_warnings():
        # The exporter warns of its own deprecations.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
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
    onnx.helper.set_model_props(model, metadata(about))
    write_durably(path, model.SerializeToString(deterministic=True))


def _read_onnx(_: Weights, path: Path) -> Classifier:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _how_onnx(_: Weights) -> list[str]:
    return [
        "import onnxruntime",
        "model = onnxruntime.InferenceSession(str(file))",
        "said = model.get_modelmeta().custom_metadata_map",
        'about = {name: json.loads(said[name]) for name in ("class_names", "preprocessing")}',
    ]


_RUN_ONNX = '    logits = model.run(["logits"], {"images": picture})[0][0]'


def _formats(pixels: bool) -> dict[str, Format]:
    onnx = Format(
        "{model}.onnx",
        partial(_write_onnx, pixels=pixels),
        _read_onnx,
        _how_onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
        run=_RUN_ONNX,
        pixels=pixels,
    )
    return {
        "onnx": onnx,
        "onnx-int8": onnx._replace(file="{model}-int8.onnx", int8=True),
        "torch-export": Format(
            "{model}.pt2",
            partial(_write_torch_export, pixels=pixels),
            _read_torch_export,
            _how_torch_export,
            pixels=pixels,
        ),
    }


TRACED = _formats(pixels=False)
# The same with uint8 images as the input.
OF_PIXELS = _formats(pixels=True)
