"""The layout of a model hub: weights, a configuration and the head of a card. Nothing is uploaded."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from fastokd.checkpoint import write_durably
from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import UserError
from fastokd.export.classify import BESIDE
from fastokd.export.formats import (
    About,
    Classifier,
    Format,
    arguments,
    foreign_name,
    read_safetensors,
    statements,
    write_safetensors,
)
from fastokd.models import Student
from fastokd.student.weights import Weights

FILE = "model.safetensors"


def _in_timm(weights: Weights) -> bool:
    try:
        foreign_name(weights, "timm")
    except UserError:
        return False
    return True


def _library(weights: Weights) -> str:
    return "timm" if _in_timm(weights) else "fastokd"


def _write(weights: Weights, student: Student, path: Path, about: About) -> None:
    write_safetensors(weights, student, path, about)
    classes = len(about["class_names"])
    library = _library(weights)
    options = arguments(weights, library)
    options.pop("num_classes")
    # The form that timm's `local-dir:` reads.
    config = {
        "architecture": foreign_name(weights, "timm") if library == "timm" else weights.model,
        "num_classes": classes,
        "label_names": about["class_names"],
        "model_args": options,
        "pretrained_cfg": {"num_classes": classes, **_shown_by_timm(weights.preprocessing)},
    }
    text = json.dumps(config, indent=1) + "\n"
    write_durably(path.with_name("config.json"), text.encode())


def _shown_by_timm(shown: Preprocessing) -> dict[str, Any]:
    """The preprocessing in timm's terms; they can't describe the resizing of small grey pictures."""
    share = shown.input_size / shown.view.resize
    # timm rounds input_size / crop_pct down.
    while math.floor(shown.input_size / share) < shown.view.resize:
        share = math.nextafter(share, 0)
    return {
        "input_size": [3, shown.input_size, shown.input_size],
        "mean": list(shown.mean),
        "std": list(shown.std),
        "interpolation": "bilinear",
        "crop_pct": share,
        "crop_mode": "center",
    }


def _read(weights: Weights, path: Path) -> Classifier:
    if not (_in_timm(weights) and importlib.util.find_spec("timm")):
        return read_safetensors(weights, path)
    import timm

    net: nn.Module = timm.create_model(f"local-dir:{path.parent}", pretrained=True)
    return net.eval()


def _statements(weights: Weights) -> list[str]:
    if _in_timm(weights):
        made = 'timm.create_model(f"local-dir:{file.parent}", pretrained=True)'
        return ["import timm", "import torch", f"model = {made}.eval()", BESIDE]
    return statements(weights)


def front_matter(weights: Weights) -> str:
    """What a model hub reads at the head of a card."""
    return (
        f"---\nlibrary_name: {_library(weights)}\npipeline_tag: image-classification\ntags:\n"
        "- image-classification\n- knowledge-distillation\n---\n\n"
    )


HUB = Format(FILE, _write, _read, _statements)
