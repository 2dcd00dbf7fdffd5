"""Activation checkpointing: the same numbers to the bit, from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import OurLoop
from fastokd.errors import UserError
from fastokd.plan.trace import trace_ours
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions

PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}
OURS = "okddip-branch@2/resnet8/digits"
VGG = "dml@2/vgg16/digits"
MOBILE = "dml@2/torchvision:mobilenet_v3_small/digits"


def small(name: str, **changes: Any) -> Recipe:
    return recipe(name, **{"batch_size": 6, **changes})


def trained(one: Recipe, saves: bool, **options: Any) -> dict[str, Tensor]:
    """All state after three steps, and the gradients of a fourth."""
    torch.manual_seed(0)
    how = RunOptions(**{**PLAIN, **options}, checkpoint_activations=saves)
    loop = OurLoop(one, how)
    for _ in range(3):
        loop.step()
    return {name: value.clone() for name, value in loop.session.state()[0].items()}


CASES = [
    (OURS, {}, {}),
    (OURS, {}, {"impl": "torch", "precision": "bf16"}),
    (OURS, {}, {"engine": "grouped"}),
    (OURS, {}, {"engine": "grouped", "precision": "bf16", "impl": "torch"}),
    (OURS, {}, {"accumulate": 2, "clip_norm": 1.0}),
    (VGG, {"model_options": {"dropout": 0.5}}, {}),
    (MOBILE, {}, {}),
    ("dml@2/timm:test_convnext/digits", {"drop_path_rate": 0.5}, {"accumulate": 2}),
]


@pytest.mark.parametrize(("name", "changes", "options"), CASES)
def test_the_same_bits(name: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Weights, momenta, running statistics and their counts, random states."""
    one = small(name, **changes)
    wanted, found = (trained(one, saves, **options) for saves in (False, True))
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


def test_less_memory_and_a_second_forward() -> None:
    one = small("dml@2/resnet20/digits", batch_size=64)
    plain, saving = (trace_ours(one, 64, "loop", "fp32", "auto", saves) for saves in (False, True))
    assert saving.activation_bytes < 0.5 * plain.activation_bytes
    assert saving.peak_bytes < 0.6 * plain.peak_bytes
    assert 1.25 < saving.flops / plain.flops < 1.4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "vmap"}, "engine='vmap' can't recompute activations"),
        ({"compile": True}, "a compiled step can't recompute activations"),
        ({"sync_bn": True}, "checkpoint_activations and sync_bn"),
    ],
)
def test_what_cannot_recompute_says_so(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(small(OURS), RunOptions(**{**PLAIN, **options}, checkpoint_activations=True))
