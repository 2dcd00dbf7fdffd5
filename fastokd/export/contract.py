"""What an export says of its student: class names, preprocessing, the network's input, its score."""

from __future__ import annotations

import json
from typing import Any

from fastokd import __version__
from fastokd.data.preprocessing import Preprocessing
from fastokd.recipe.recipe import Recipe
from fastokd.student.weights import Weights


def about_export(weights: Weights, to: str, file: str, pixels: bool) -> dict[str, Any]:
    """The content of an export's ``student.json``; docs/deployment.md describes each field.

    Args:
        to: the format.
        file: the exported file's name.
        pixels: the network takes uint8 images and normalises them itself.
    """
    recipe = Recipe.from_json(weights.fact("recipe")) if "recipe" in weights.facts else None
    return {
        "file": file,
        "format": to,
        "fastokd": __version__,
        "recipe": recipe.name if recipe else None,
        **weights.about(),
        "preprocessing": contract(weights.preprocessing, pixels),
    }


def contract(shown: Preprocessing, pixels: bool) -> dict[str, Any]:
    """The preprocessing, step by step in the order of the fields, and the network's input."""
    size = shown.input_size
    native = {
        "size": shown.native_size,
        "levels": shown.levels,
        "enlarged_by": "black border" if shown.border else "bicubic",
    }
    resize = shown.native_size or shown.view.resize
    crop = shown.native_size or size
    return {
        "description": shown.sentence(),
        "exif_orientation": True,
        "background": [shown.background] * 3,
        "color_order": "RGB",
        "grayscale": shown.grey,
        "resize": resize,
        "resize_side": "shorter",
        "interpolation": "bilinear",
        "antialias": True,
        "crop": "center",
        "crop_size": [crop, crop],
        "native": native if shown.native_size else None,
        # None: the network does it.
        "normalize": None
        if pixels
        else {"scale": 1 / 255, "mean": [*shown.mean], "std": [*shown.std]},
        "input": {
            "name": "images",
            "dtype": "uint8" if pixels else "float32",
            "layout": "NHWC" if pixels else "NCHW",
            "shape": ["batch", size, size, 3] if pixels else ["batch", 3, size, size],
        },
    }


def metadata(about: dict[str, Any]) -> dict[str, str]:
    """``about`` as strings, for a file that holds nothing else: text as it is, other values as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in about.items()
        if name != "file"
    }


def input_sentence(about: dict[str, Any]) -> str:
    """The network's input in words."""
    shown = about["preprocessing"]
    entry, normalize = shown["input"], shown["normalize"]
    shape = ", ".join(map(str, entry["shape"]))
    values = (
        "0 to 255, which the network normalises"
        if normalize is None
        else f"divided by 255, less mean ({_numbers(normalize['mean'])}), divided by std "
        f"({_numbers(normalize['std'])})"
    )
    return f"{entry['dtype']} [{shape}], RGB, {values}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
