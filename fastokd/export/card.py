"""The card of an export, ``card.json`` and ``README.md``: what the student is, costs and gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastokd.export.contract import input_sentence
from fastokd.export.formats import plain_state
from fastokd.host.names import counted, in_markdown, on_a_line
from fastokd.models.info import count_macs
from fastokd.recipe.recipe import Recipe
from fastokd.student.weights import OPTIONAL, Weights

JSON, MARKDOWN = "card.json", "README.md"
# Of more classes, the README lists the accuracy of the worst, and no names.
MOST_CLASSES, WORST = 100, 20
MEASURE = "`fastokd export --measure` measures it."


def facts(weights: Weights, about: dict[str, Any], size: int) -> dict[str, Any]:
    """The content of ``card.json`` but for what is measured; docs/deployment.md describes each field.

    Args:
        about: the export's ``student.json``.
        size: bytes of the exported file.
    """
    network, side = weights.build(), weights.preprocessing.input_size
    plain = replace(weights, state=plain_state(weights, network)).to_bytes()
    with torch.no_grad():
        macs = count_macs(network, torch.zeros(1, 3, side, side))
    return {
        **about,
        "recipe": weights.fact("recipe") if "recipe" in weights.facts else None,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs,
        "bytes": {"safetensors": len(plain), about["format"]: size},
        "calibration": None,
        "accuracy": None,
        "latency": None,
    }


def markdown(weights: Weights, card: dict[str, Any], code: str) -> str:
    """``README.md``; ``code`` is the export's ``classify.py``."""
    lines = [
        f"# {weights.model}, {counted(len(card['class_names']), 'class')}",
        "",
        f"{_origin(weights)} This is {in_markdown(card['role'])}.",
        "",
        *_costs(card),
        *_accuracy(card),
        *_latency(card),
        *_trained(weights),
        "## Images",
        "",
        weights.preprocessing.sentence(),
        "",
        f"The network's input is {input_sentence(card)}.",
        "",
        f"The classes, in the order of the logits: {_names(card['class_names'])}.",
        "",
        "## Use",
        "",
        "In this folder:",
        "",
        "```sh\npython classify.py picture.jpg\n```",
        "",
        "The program shows how the network is loaded and how a picture is preprocessed:",
        "",
        f"```python\n{code}```",
        "",
    ]
    return "\n".join(lines)


def _names(classes: list[str]) -> str:
    if len(classes) > MOST_CLASSES:
        return f"{len(classes):,} names in `student.json`"
    return ", ".join(map(in_markdown, classes))


def _costs(card: dict[str, Any]) -> list[str]:
    rows = [
        ("parameters", f"{card['parameters']:,}"),
        ("multiply-accumulates an image, convolutions and linear layers", f"{card['macs']:,}"),
        *((f"bytes as {name}", f"{size:,}") for name, size in card["bytes"].items()),
    ]
    return ["## Size", "", *_table(("counted", ""), rows), ""]


def _accuracy(card: dict[str, Any]) -> list[str]:
    lines = ["## Accuracy", ""]
    score = card.get("score")
    if score:
        name = {"test": "Test", "val": "Validation"}[score["split"]]
        lines += [
            f"{name} top-1 of these weights, after epoch {score['epoch']}: "
            f"{100 * score['top1']:.2f} % (measured by the run).",
            "",
        ]
    found = card["accuracy"]
    if found is None:
        return [*lines, f"By class: not measured. {MEASURE}", ""]
    formats = found["formats"]
    said = ", ".join(f"{100 * of['top1']:.2f} % in {name}" for name, of in formats.items())
    lines += [
        f"Top-1 over {counted(found['images'], 'test image')}, of one view each: {said} "
        f"({found['how']}, {in_markdown(found['cpu'])}).",
        "",
    ]
    if "agreement" in found:
        first, second = formats
        lines += [
            f"{first} and {second} choose the same class for {100 * found['agreement']:.2f} % of them. "
            f"Calibrated with {in_markdown(card['calibration']['what'])}.",
            "",
        ]
    return [*lines, *_by_class(card["class_names"], found), ""]


def _by_class(names: list[str], found: dict[str, Any]) -> list[str]:
    formats, counts = found["formats"], found["images_by_class"]
    chosen = [c for c in range(len(names)) if counts[c]]
    lines = []
    if len(chosen) > MOST_CLASSES:
        first = next(iter(formats.values()))["by_class"]
        chosen = sorted(chosen, key=lambda c: first[c])[:WORST]
        lines = [f"The {WORST} worst of {len(names):,} classes; all are in `{JSON}`.", ""]
    rows = [
        (
            in_markdown(names[c]),
            f"{counts[c]:,}",
            *(f"{100 * of['by_class'][c]:.1f} %" for of in formats.values()),
        )
        for c in chosen
    ]
    return [*lines, *_table(("class", "images", *formats), rows)]


def _latency(card: dict[str, Any]) -> list[str]:
    found = card["latency"]
    if found is None:
        return ["## Latency", "", f"Not measured. {MEASURE}", ""]
    rows = []
    for row in found["rows"]:
        time = (
            f"{row['ms']:.3g} ({row['low_ms']:.3g} to {row['high_ms']:.3g})"
            if "ms" in row
            else in_markdown(row["error"])
        )
        rate = f"{1e3 * row['batch'] / row['ms']:,.0f}" if "ms" in row else ""
        name = row["program"] + (f", {row['format']}" if row["format"] else "")
        rows.append((name, str(row["batch"]), time, rate, f"{row['how']}, {row['device']}"))
    header = ("program", "batch", "ms (quartiles)", "images/s", "how")
    onnxruntime = found["onnxruntime"]
    return [
        "## Latency",
        "",
        f"A forward pass, in float32 or in the format's precision; {found['how']}. "
        f"{counted(found['threads'], 'thread')} of {in_markdown(found['cpu'])}, torch {found['torch']}"
        f"{f', onnxruntime {onnxruntime}' if onnxruntime else ''}.",
        "",
        *_table(header, rows),
        "",
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    ruled = ["---", *["--:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ruled, *rows)]


def _origin(weights: Weights) -> str:
    if "converted_from" in weights.facts:
        return f"Converted by fastokd from a checkpoint of {weights.fact('converted_from')}."
    if weights.fact("role") == "the only student":
        return "Trained with fastokd."
    return "Trained with fastokd in a group of students that teach each other."


def _trained(weights: Weights) -> list[str]:
    """The recipe, and which weights were kept."""
    if "recipe" not in weights.facts:
        return []
    recipe = Recipe.from_json(weights.fact("recipe"))
    networks = f"{recipe.students} networks" if recipe.students > 1 else "one network"
    lines = [
        "## Training",
        "",
        f"Recipe `{on_a_line(recipe.name)}`: {in_markdown(recipe.method)}, {networks}, {recipe.dataset}, "
        f"{recipe.epochs} epochs, seed {recipe.seed}. All settings are in `{JSON}`, under `recipe`.",
        "",
    ]
    said = {name: weights.fact(name) for name in OPTIONAL if name in weights.facts}
    if said.get("ema") is not None:
        lines += [f"The weights are a running average over the steps, of decay {said['ema']}.", ""]
    if said.get("swa"):
        since = f"epoch {recipe.average_start + 1}" if recipe.average_start else "the first"
        lines += [f"The weights are the uniform average over the steps from {since} on (SWA).", ""]
    return lines
