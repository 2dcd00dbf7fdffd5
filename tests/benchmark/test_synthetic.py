"""What is drawn in place of data sets and teachers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fastokd.benchmark.synthetic import drawn_batch, drawn_splits, drawn_teacher
from fastokd.models import create_model
from fastokd.recipe.names import recipe


def test_a_deep_teachers_logits_fit_fp16(tmp_path: Path) -> None:
    of = recipe("kd/resnet8/digits", batch_size=2)
    assert of.teacher == "baseline/resnet110/digits"
    file = drawn_teacher(of, drawn_splits(of, drawn_batch(of)), tmp_path)
    assert file is not None
    network = create_model("resnet110", 10)
    network.load_state_dict(load_file(file))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert network.eval()(images).abs().max() < 100
