"""What a recipe's training costs: multiply-accumulates an image, and a step's peak memory."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.device import pick_device, pick_precision
from fastokd.errors import forget
from fastokd.learner.build import build_cohort
from fastokd.methods import Progress, method_class
from fastokd.models import create_model, list_models, model_spec
from fastokd.models.info import count_macs
from fastokd.plan.trace import trace_ours
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.options import RunOptions

COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# Images of the forward that is counted: two, since a norm needs more than one value.
BATCH = 2
# A larger student's multiply-accumulates are at most this factor from those of the students together.
NEAR = 1.5


def training_macs(of: Recipe, num_classes: int, teacher: nn.Module | None = None) -> int:
    """Multiply-accumulates that one training image costs in convolutions and linear layers.

    A layer that is trained counts three times, once forward and twice backward; one that runs without
    gradient (a teacher) counts once. They are counted in one forward of cohort and method over random
    images.

    Args:
        teacher: in place of the recipe's own; its weights don't matter.
    """
    with torch.random.fork_rng(devices=[]):
        if teacher is None and method_class(of.method).needs.teacher:
            taught_by = recipe(of.teacher)
            teacher = create_model(taught_by.model, num_classes, **taught_by.model_options)
        cohort, method = build_cohort(
            of, num_classes, image_size=of.image_size, teacher=teacher, impl="torch"
        )
        cohort.set_engine("loop")
        parts = [cohort, method, *([] if teacher is None else [teacher])]
        layers = {layer for part in parts for layer in part.modules() if isinstance(layer, COUNTED)}
        total = 0

        def count(layer: Any, inputs: Any, out: Tensor) -> None:
            nonlocal total
            if isinstance(layer, nn.ConvTranspose2d):
                macs = layer.weight[0].numel() * inputs[0].numel()
            else:
                macs = layer.weight[0].numel() * out.numel()
            total += macs * (3 if out.requires_grad else 1)

        hooks = [layer.register_forward_hook(count) for layer in layers]
        views = () if of.number_of_views is None else (of.number_of_views,)
        shape = (*views, BATCH, of.image_size, of.image_size, 3)
        progress = Progress.start()
        progress.draws = method.draw(BATCH, torch.Generator())
        try:
            out = cohort(torch.randint(256, shape, dtype=torch.uint8))
            with suppress(Exception):  # a loss that needs a whole batch: the students alone count
                method(out, torch.arange(BATCH) % num_classes, progress)
        finally:
            for hook in hooks:
                hook.remove()
    return total // BATCH


@dataclass(frozen=True)
class Larger:
    """A student of the registry, and how many times as many multiply-accumulates it has."""

    model: str
    ratio: float


def larger_student(model: str, times: float, num_classes: int, image_size: int) -> Larger | None:
    """The registry's student whose multiply-accumulates are nearest to ``times`` those of ``model``.

    Only students that were published for images of the same size count. None if the nearest is more than
    a factor of ``NEAR`` away.
    """
    size = model_spec(model).input_size
    own = _macs(model, num_classes, image_size)
    ratios = {
        name: _macs(name, num_classes, image_size) / own
        for name in list_models()
        if name != model and ":" not in name and model_spec(name).input_size == size
    }
    found = min(ratios, key=lambda name: abs(math.log(ratios[name] / times)), default=None)
    if found is None or abs(math.log(ratios[found] / times)) > math.log(NEAR):
        return None
    return Larger(found, ratios[found])


@cache
def _macs(model: str, num_classes: int, image_size: int) -> int:
    with torch.no_grad(), torch.device("meta"):
        student = create_model(model, num_classes).eval()
        return count_macs(student, torch.empty(1, 3, image_size, image_size))


def counted_peak(of: Recipe, options: RunOptions) -> int | None:
    """The peak of a step's memory in bytes, counted on fake tensors (``fastokd plan``); None where the
    step can't be traced."""
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    try:
        with torch.random.fork_rng(devices=[]):
            return trace_ours(of, of.batch_size, "loop", precision, "auto").peak_bytes
    except Exception as error:  # of a method whose step reads values
        forget(error)
        return None
