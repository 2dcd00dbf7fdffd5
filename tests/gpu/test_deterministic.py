"""``--deterministic`` gives the same bits twice, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastokd
from fastokd.benchmark.loops import OurLoop
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_kernel_selection")]


@pytest.mark.parametrize("name", ["okddip-branch/resnet8", "ffsd/resnet8"])
def test_a_resumed_run_ends_with_the_same_bits(
    device: torch.device, tmp_path: Path, name: str
) -> None:
    one = recipe(f"{name}/digits", epochs=2, batch_size=64, students=3)
    how: dict[str, Any] = {"device": str(device), "deterministic": True, "quiet": True}
    whole = fastokd.train(one, out=tmp_path / "whole", **how)
    fastokd.train(one, out=tmp_path / "parts", max_steps=whole.last["step"] - 3, **how)
    parts = fastokd.train(one, out=tmp_path / "parts", resume=True, **how)
    assert parts.last["train"] == whole.last["train"]
    theirs = load_file(whole.folder / "student.safetensors")
    for key, value in load_file(parts.folder / "student.safetensors").items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_imagenet_s_form_has_deterministic_kernels(device: torch.device, engine: str) -> None:
    """ResNet-18 as ImageNet has it: a pooled stem, strided shortcuts; captured too."""
    one = recipe("okddip-network/resnet18/imagenet", students=2, batch_size=4, image_size=64)
    ends = []
    for _ in range(2):
        options = RunOptions(
            device=str(device),
            engine=engine,
            precision="bf16",
            deterministic=True,
            capture=device.type == "cuda",
        )
        loop = OurLoop(one, options)
        for _ in range(14):
            loop.step()
        ends.append(torch.cat([p.detach().flatten() for p in loop.session.parameters()]))
    assert torch.equal(*ends)
