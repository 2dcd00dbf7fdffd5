"""Counts, shapes and the split of every student, against the published facts."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch

from fastokd.models import create_model, list_models, model_info, model_spec, trunk_shape

FACTS: dict[str, Any] = json.loads(
    resources.files("fastokd.facts").joinpath("students.json").read_text()
)
STUDENTS = {**FACTS["cifar"], **FACTS["imagenet"]}
CASES = [
    (name, int(key.removeprefix("params_c")))
    for name, facts in STUDENTS.items()
    for key in facts
    if key.startswith("params_c")
]


@pytest.mark.parametrize(("name", "num_classes"), CASES)
def test_facts(name: str, num_classes: int) -> None:
    facts = STUDENTS[name]
    info = model_info(name, num_classes)
    assert info.name == name
    assert info.params == facts[f"params_c{num_classes}"]
    assert info.feature_dim == facts["feature_dim"]
    if f"macs_c{num_classes}" in facts:
        assert info.macs == facts[f"macs_c{num_classes}"]
    if "maps" in facts:
        assert info.maps == facts["maps"]
    else:
        assert len(info.maps) in (3, 4)


@pytest.mark.parametrize("name", sorted(FACTS["branch_cohorts_of_4_cifar100"].keys() - {"_about"}))
def test_branch_cohort_facts(name: str) -> None:
    """Four students over one trunk, and the two projections."""
    facts = FACTS["branch_cohorts_of_4_cifar100"][name]
    with torch.device("meta"):
        model, trunk = create_model(name, 100), create_model(name, 100)
    model.keep_stages(model.branch_from, None)
    trunk.keep_stages(0, trunk.branch_from)
    params = [sum(p.numel() for p in part.parameters()) for part in (trunk, model)]
    projections = 2 * model.feature_dim * (model.feature_dim // 8)
    assert params[0] + 4 * params[1] + projections == facts["params"]


@pytest.mark.parametrize(
    ("name", "num_classes", "params"),
    [
        # Zagoruyko and Komodakis, and the widely used CIFAR-100 forms of He et al. with 1x1
        # shortcuts.
        ("wrn_16_2_basic", 100, 703_284),
        ("wrn_40_2_basic", 100, 2_255_156),
        ("wrn_28_4_basic", 100, 5_872_180),
        ("wrn_28_10_basic", 10, 36_479_194),
        ("resnet110_basic", 100, 1_736_564),
    ],
)
def test_canonical_forms(name: str, num_classes: int, params: int) -> None:
    assert model_info(name, num_classes).params == params


# The widest is left out: 36 million weights that wrn_16_2_basic has in small.
@pytest.mark.parametrize("name", sorted({*list_models()} - {"wrn_28_10_basic"}))
@torch.no_grad()
def test_trunk_and_branch_make_the_whole(name: str) -> None:
    """Cut in two, with the weights of the whole: the same outputs, and no parameter twice."""
    spec = model_spec(name)
    size = 32 if spec.input_size == 32 else 64
    x_BCHW = torch.randn(2, 3, size, size)
    whole = create_model(name, 10).eval()
    with torch.device("meta"):
        trunk, branch = create_model(name, 10).eval(), create_model(name, 10).eval()
    trunk.keep_stages(0, trunk.branch_from)
    branch.keep_stages(branch.branch_from, None)
    state = whole.state_dict()
    keys = [set(part.state_dict()) for part in (trunk, branch)]
    assert keys[0] | keys[1] == set(state)
    assert not keys[0] & keys[1]
    for part, own in zip((trunk, branch), keys, strict=True):
        part.load_state_dict({key: state[key] for key in own}, assign=True)

    want = whole.outputs(x_BCHW)
    trunk_BCHW, trunk_maps = trunk.trunk(x_BCHW, trunk.branch_from)
    got = branch.outputs(trunk_BCHW, branch.branch_from)
    assert torch.equal(got.logits_BC, want.logits_BC)
    assert torch.equal(got.features_BD, want.features_BD)
    assert got.features_BD.shape == (2, whole.feature_dim)
    maps = trunk_maps + got.maps
    assert len(maps) == len(want.maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, want.maps, strict=True))
    assert torch.equal(whole(x_BCHW), want.logits_BC)


# The channels of what a branch starts from: ONE's published gate (``control_v1``) has this width.
TRUNK_CHANNELS = {
    "resnet32": 32,
    "resnet110": 128,
    "wrn_20_8": 128,
    "vgg16": 512,
    "densenet_40_12": 60,
    "resnet34": 128,
}


@pytest.mark.parametrize("name", TRUNK_CHANNELS)
def test_trunk_width(name: str) -> None:
    assert trunk_shape(name, 10)[0] == TRUNK_CHANNELS[name]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in STUDENTS),
        *((name, torch.bfloat16) for name in ("resnet20", "vgg16")),
    ],
)
def test_channels_last(name: str, dtype: torch.dtype) -> None:
    """Trains in channels-last: the maps stay so, and every parameter has a finite gradient."""
    model = create_model(name, 10).to(dtype, memory_format=torch.channels_last)
    size = 32 if model_spec(name).input_size == 32 else 64
    x_BCHW = torch.randn(2, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    output = model.outputs(x_BCHW)
    for map_BCHW in output.maps:
        assert map_BCHW.dtype == dtype
        assert map_BCHW.is_contiguous(memory_format=torch.channels_last)
    output.logits_BC.float().logsumexp(1).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
