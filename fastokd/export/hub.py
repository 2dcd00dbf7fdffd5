"""The layout of a model hub: weights, a configuration, a card. Files only; nothing is uploaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch import nn

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.export.formats import (
    Classifier,
    Format,
    foreign_name,
    read_safetensors,
    write_safetensors,
)
from fastokd.models import Student
from fastokd.names import in_markdown, on_a_line
from fastokd.student_file import Weights
from fastokd.training.run_folder import RunFolder

FILE = "model.safetensors"
TIMM = """```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)
```"""
OURS = """```python
from safetensors.torch import load_file
from fastokd.models import create_model

model = create_model("{model}", {classes}{options})
model.load_state_dict(load_file("model.safetensors"))
```"""


def _in_timm(weights: Weights) -> bool:
    try:
        foreign_name(weights, "timm")
    except UserError:
        return False
    return True


def _write(weights: Weights, student: Student, folder: Path) -> str:
    (folder / write_safetensors(weights, student, folder)).rename(folder / FILE)
    about = weights.about()
    classes, size = len(about["class_names"]), about["input_size"]
    in_timm = _in_timm(weights)
    # timm's form: `local-dir:` reads it.
    config = {
        "architecture": foreign_name(weights, "timm") if in_timm else weights.model,
        "num_classes": classes,
        "label_names": about["class_names"],
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, size, size],
            "mean": about["mean"],
            "std": about["std"],
        },
    }
    write_durably(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    card = _card(weights, about, "timm" if in_timm else "fastokd")
    write_durably(folder / "README.md", card.encode())
    return FILE


def _read(weights: Weights, path: Path) -> Classifier:
    if not (_in_timm(weights) and importlib.util.find_spec("timm")):
        return read_safetensors(weights, path)
    import timm

    net: nn.Module = timm.create_model(f"local-dir:{path.parent}", pretrained=True)
    return net.eval()


def _how(weights: Weights, name: str) -> str:
    if _in_timm(weights):
        return f'timm.create_model("local-dir:{Path(name).parent}", pretrained=True)'
    return f'safetensors.torch.load_file("{name}")'


def _card(weights: Weights, about: dict[str, Any], library: str) -> str:
    """What the student is, what it was trained on, how to load it.

    Accuracy is told where the run that trained it is at hand.
    """
    classes = len(about["class_names"])
    options = "".join(f", {key}={value!r}" for key, value in weights.options.items())
    ours = OURS.format(model=weights.model, classes=classes, options=options)
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
        "Trained with fastokd in a group of students that teach each other. "
        f"This is {in_markdown(about['role'])}.",
        "",
        *_trained(weights),
        "## Images",
        "",
        f"RGB, {about['input_size']} x {about['input_size']}, from 0 to 1, less "
        f"{_numbers(about['mean'])}, divided by {_numbers(about['std'])} (red, green, blue). "
        "The classes, in order, are in `student.json`.",
        "",
        "## Use",
        "",
        TIMM if library == "timm" else ours,
        "",
    ]
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _trained(weights: Weights) -> list[str]:
    """Recipe and accuracy, of the run that holds the student."""
    run = next((p for p in weights.path.parents if (p / "recipe.json").is_file()), None)
    if run is None:
        return []
    folder = RunFolder(run)
    recipe = folder.recipe()
    lines = [
        "## Training",
        "",
        f"Recipe `{on_a_line(recipe.name)}`: {in_markdown(recipe.method)}, {recipe.students} networks, {recipe.dataset}, "
        f"{recipe.epochs} epochs, seed {recipe.seed}.",
        "",
    ]
    measured = [row for row in folder.metrics() if "test" in row]
    if measured:
        top1 = measured[-1]["test"]["student_top1"][weights.fact("student")]
        lines += [f"Test top-1 after epoch {measured[-1]['epoch'] + 1}: {100 * top1:.2f} %.", ""]
    return lines


HUB = Format(_write, _read, _how)
