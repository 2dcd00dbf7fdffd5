"""One compiled candidate in a process of its own: a job in JSON comes in, its times go out."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fastokd.data import DatasetSplits, Split
from fastokd.recipes import Recipe
from fastokd.training.session import RunOptions, Session
from fastokd.training.tuning import TIMED_STEPS, time_steps


def work(job: dict[str, Any]) -> dict[str, float]:
    """Trains a few steps on drawn images of the job's shape: ms a step, and what came before."""
    recipe = Recipe.from_json(job["recipe"])
    engine, memory_format = job["choice"]
    options = RunOptions(
        device=job["device"],
        precision=job["precision"],
        engine=engine,
        compile=True,
        memory_format=memory_format,
        impl=job["impl"],
        optimizer=job["optimizer"],
        accumulate=job["accumulate"],
        teacher=None if job["teacher"] is None else Path(job["teacher"]),
        quiet=True,
    )
    session = Session(recipe, options, data=drawn(recipe.batch_size, job["image"], job["classes"]))
    # The second step may compile again, for states that the first one made.
    before = sum(time_steps(session, 2))
    step_ms = statistics.median(time_steps(session, TIMED_STEPS))
    return {"compile_seconds": before / 1e3, "step_ms": step_ms}


def drawn(count: int, size: list[int], classes: int) -> DatasetSplits:
    """``count`` random images of ``size`` (height, width) for each split."""
    images_NHWC = torch.randint(256, (count, *size, 3), dtype=torch.uint8)
    split = Split(images_NHWC, torch.arange(count) % classes)
    names = tuple(str(label) for label in range(classes))
    return DatasetSplits("drawn", names, (0.5,) * 3, (0.25,) * 3, split, split, split)


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
