"""One compiled candidate in a process of its own: a job in JSON comes in, its times go out."""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch

from fastokd.data import DatasetSplits, Split
from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import in_one_line
from fastokd.methods import register_method
from fastokd.recipe.names import Recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.trial import TIMED_STEPS, time_steps, warm_up_steps


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Trains a few steps on drawn images: ms a step, and what came before; or why it can't."""
    try:
        if ":" in job["recipe"]["method"]:  # named by the user whose run this is
            register_method(job["recipe"]["method"])
        recipe = Recipe.from_json(job["recipe"])
        data = drawn(recipe.batch_size, **job["data"])
        session = build(recipe, RunOptions(**job["options"]), data=data)
        batch = session.next_batch()
        before = sum(time_steps(session, batch, warm_up_steps(session, compiled=True)))
        step_ms = statistics.median(time_steps(session, batch, TIMED_STEPS))
    except Exception as error:
        # Memory may run out because of what else is on the device: another run tries again.
        final = not isinstance(error, torch.OutOfMemoryError)
        return {"note": in_one_line(error), "failed": True, "final": final}
    return {"compile_seconds": before / 1e3, "step_ms": step_ms}


def drawn(
    count: int, image: list[int], class_names: list[str], preprocessing: dict[str, Any]
) -> DatasetSplits:
    """``count`` random images of the shape ``[H, W, 3]`` for each split."""
    images_NHWC = torch.randint(256, (count, *image), dtype=torch.uint8)
    split = Split(images_NHWC, torch.arange(count) % len(class_names))
    names = tuple(class_names)
    shown = Preprocessing(**preprocessing)
    return DatasetSplits("drawn", names, shown, split, split, split)


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
