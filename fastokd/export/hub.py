"""The layout of a model hub: weights, a configuration and a card. Nothing is uploaded."""

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
from fastokd.export.classify import BESIDE, program
from fastokd.export.contract import input_sentence
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
from fastokd.host.names import in_markdown, on_a_line
from fastokd.models import Student
from fastokd.recipe.recipe import Recipe
from fastokd.student.weights import OPTIONAL, Weights

FILE = "model.safetensors"


def _in_timm(weights: Weights) -> bool:
    try:
        foreign_name(weights, "timm")
    except UserError:
        return False
    return True


def _write(weights: Weights, student: Student, path: Path, about: About) -> None:
    write_safetensors(weights, student, path, about)
    classes = len(about["class_names"])
    library = "timm" if _in_timm(weights) else "fastokd"
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
    write_durably(path.with_name("README.md"), _card(weights, about, library).encode())


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


def _card(weights: Weights, about: dict[str, Any], library: str) -> str:
    """The model card: the student, its training data, how to load it; all from its facts."""
    classes = len(about["class_names"])
    code = program(weights.preprocessing, FILE, _statements(weights), about=about)
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- knowledge-distillation",
        "---",
        "",
        f"# {weights.model}, {classes} classes",
        "",
        f"{_origin(weights)} This is {in_markdown(about['role'])}.",
        "",
        *_trained(weights),
        "## Images",
        "",
        weights.preprocessing.sentence(),
        "",
        f"The network's input is {input_sentence(about)}. The classes, in order, are in "
        "`student.json`.",
        "",
        "## Use",
        "",
        f"With {library}, in this folder:",
        "",
        "```sh\npython classify.py picture.jpg\n```",
        "",
        "The program shows how the network is loaded and how a picture is preprocessed:",
        "",
        f"```python\n{code}```",
        "",
    ]
    return "\n".join(lines)


def _origin(weights: Weights) -> str:
    if "converted_from" in weights.facts:
        return f"Converted by fastokd from a checkpoint of {weights.fact('converted_from')}."
    if weights.fact("role") == "the only student":
        return "Trained with fastokd."
    return "Trained with fastokd in a group of students that teach each other."


def _trained(weights: Weights) -> list[str]:
    """The recipe, and the accuracy of these weights if it was measured."""
    if "recipe" not in weights.facts:
        return []
    recipe = Recipe.from_json(weights.fact("recipe"))
    networks = f"{recipe.students} networks" if recipe.students > 1 else "one network"
    lines = [
        "## Training",
        "",
        f"Recipe `{on_a_line(recipe.name)}`: {in_markdown(recipe.method)}, {networks}, {recipe.dataset}, "
        f"{recipe.epochs} epochs, seed {recipe.seed}.",
        "",
    ]
    said = {name: weights.fact(name) for name in OPTIONAL if name in weights.facts}
    if said.get("ema") is not None:
        lines += [f"The weights are a running average over the steps, of decay {said['ema']}.", ""]
    if said.get("swa"):
        since = f"epoch {recipe.average_start + 1}" if recipe.average_start else "the first"
        lines += [f"The weights are the uniform average over the steps from {since} on (SWA).", ""]
    if said.get("score"):
        split, top1, epoch = (said["score"][name] for name in ("split", "top1", "epoch"))
        name = {"test": "Test", "val": "Validation"}[split]
        lines += [f"{name} top-1 of these weights, after epoch {epoch}: {100 * top1:.2f} %.", ""]
    return lines


HUB = Format(FILE, _write, _read, _statements)
