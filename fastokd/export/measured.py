"""What is measured of an exported file for its card, and what is printed of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.errors import warn
from fastokd.export.accuracy import accuracy
from fastokd.export.formats import About, Format
from fastokd.export.latency import Program, latency, of_onnx, of_torch
from fastokd.export.source import Source
from fastokd.export.traced import OF_PIXELS, TRACED
from fastokd.host.names import counted
from fastokd.student.weights import Weights

# The loss of top-1 by int8 from which on a warning is printed.
MUCH = 0.01


class Job(NamedTuple):
    """An export that is being written: its ``file``, its ``student.json``, and ``float32``, where an
    export to ONNX lies of which it is the int8 form, or which is measured beside it."""

    form: Format
    weights: Weights
    about: About
    file: Path
    float32: Path
    source: Source

    def inputs(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images as the exported network's input."""
        if self.form.pixels:
            return images_BHWC
        return self.weights.preprocessing.normalized(images_BHWC)


def measured(job: Job, facts: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    """The entries of a card that are measured: the accuracy of an int8 file, and with a ``device``
    any other's, too, and the latency on the CPU and on that device.

    Args:
        facts: the card's other entries.
    """
    found: dict[str, Any] = {}
    name, data = job.about["format"], job.source.data
    if data is not None and (job.form.int8 or device is not None):
        files = {name: job.file, **({"onnx": job.float32} if job.form.int8 else {})}
        classifiers = {to: job.form.read(job.weights, file) for to, file in files.items()}
        found["accuracy"] = accuracy(classifiers, data, pixels=job.form.pixels)
    if device is not None:
        found["latency"] = latency(_programs(job, device))
    if job.float32.is_file():
        found["bytes"] = facts["bytes"] | {"onnx": job.float32.stat().st_size}
    return found


def _programs(job: Job, device: torch.device) -> list[Program]:
    """The student on the CPU, and on ``device`` if that is a GPU."""
    onnx = (OF_PIXELS if job.form.pixels else TRACED)["onnx"]
    name, size = job.about["format"], job.weights.preprocessing.input_size

    def float32() -> Path:
        if name == "onnx":
            return job.file
        if not job.float32.is_file():
            onnx.write(job.weights, job.weights.build(), job.float32, job.about)
        return job.float32

    build = job.weights.build
    programs = [*of_torch(build, size, torch.device("cpu")), of_onnx("onnx", float32)]
    if job.form.int8:
        programs.append(of_onnx(name, lambda: job.file))
    if device.type == "cuda":
        programs += of_torch(build, size, device)
    return programs


def sentences(card: dict[str, Any]) -> list[str]:
    """The lines to print of what was measured; warns if int8 costs much accuracy."""
    lines = []
    if card["calibration"]:
        lines.append(f"quantised to int8, calibrated with {card['calibration']['what']}")
    found = card["accuracy"]
    if found:
        top1 = {name: of["top1"] for name, of in found["formats"].items()}
        said = ", ".join(f"{100 * share:.2f} % in {name}" for name, share in top1.items())
        lines.append(f"test top-1 over {counted(found['images'], 'image')}: {said}")
        lost = top1["onnx"] - top1["onnx-int8"] if card["calibration"] else 0.0
        if lost > MUCH:
            warn(
                f"int8 loses {100 * lost:.1f} points of test top-1: calibrate it with more or "
                "more typical images (--calibration-images, --calibrate), or export it to onnx"
            )
    elif card["calibration"] or card["latency"]:
        lines.append("its accuracy isn't measured: a file outside of a run has no test set")
    for row in card["latency"]["rows"] if card["latency"] else ():
        name = row["program"] + (f", {row['format']}" if row["format"] else "")
        time = f"{row['ms']:.3g} ms" if "ms" in row else f"not measured, {row['error']}"
        lines.append(
            f"latency of {counted(row['batch'], 'image')}, {name}, {row['device']}: {time}"
        )
    return lines
