"""Every published student against the published code, in float64 (goldens/README.md)."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fastokd.models import Student, StudentOutput, create_model
from tests.conftest import GOLDENS, fill, golden, golden_names

NAMES = sorted(path.stem for path in (GOLDENS / "models").glob("*.npz"))


def model_name(stem: str) -> str:
    return stem.split("_", 1)[1].removesuffix("_imagenet")


def build(stem: str) -> tuple[Student, Tensor]:
    """The filled student and the golden's input, both float64."""
    imagenet = stem.endswith("_imagenet")
    model = create_model(model_name(stem), 1000 if imagenet else 100).double()
    fill(model.state_dict())
    generator = torch.Generator().manual_seed(zlib.crc32(stem.encode()))
    shape = (2, 3, 224, 224) if imagenet else (4, 3, 32, 32)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)


def map_stats(map_BCHW: Tensor) -> Tensor:
    """The README's ``linspace(0, numel - 1, 64).long()`` in whole numbers: in floating point a
    place that is exact can round either way, from one CPU to the next."""
    x = map_BCHW.reshape(-1)
    picks = x[torch.arange(64) * (x.numel() - 1) // 63]
    return torch.cat([torch.stack([x.sum(), x.abs().sum(), x.square().sum()]), picks])


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """To 1e-8 of the largest entry: a cancelling entry has no relative precision of its own."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-8, f"{what}: {error:.2e}"


def assert_output(output: StudentOutput, want: dict[str, Tensor], mode: str) -> None:
    assert_close(output.logits_BC, want[f"{mode}_logits_BC"], f"{mode} logits")
    if f"{mode}_features_BD" in want:
        assert_close(output.features_BD, want[f"{mode}_features_BD"], f"{mode} features")
    for index, map_BCHW in enumerate(output.maps):
        stats = want.get(f"{mode}_map{index}_stats")
        if stats is None:
            assert f"{mode}_map0_stats" not in want, "a map more than published"
            continue
        assert list(map_BCHW.shape) == want[f"map{index}_shape"].tolist()
        ours = map_stats(map_BCHW)
        assert_close(ours[:1], stats[:1], f"{mode} map {index} sum")
        assert_close(ours[1:3], stats[1:3], f"{mode} map {index} sums")
        assert_close(ours[3:], stats[3:], f"{mode} map {index} entries")
    assert f"{mode}_map{len(output.maps)}_stats" not in want, "a published map is missing"


@pytest.mark.parametrize("stem", NAMES)
@torch.no_grad()
def test_outputs_and_running_statistics(stem: str) -> None:
    model, x_BCHW = build(stem)
    want = golden(f"models/{stem}")
    assert_output(model.train().outputs(x_BCHW), want, "train")

    buffers = dict(model.named_buffers())
    names = golden_names(f"models/{stem}", "buffer_names")
    ours = torch.stack(
        [torch.stack([buffers[name].sum(), buffers[name].square().sum()]) for name in names]
    )
    assert torch.allclose(ours, want["buffer_sums"], rtol=1e-8, atol=1e-8)

    fill(model.state_dict())
    assert_output(model.eval().outputs(x_BCHW), want, "eval")


@pytest.mark.parametrize("stem", NAMES)
def test_keys_and_shapes_are_the_published_ones(stem: str) -> None:
    with torch.device("meta"):
        model = create_model(model_name(stem), 1000 if stem.endswith("_imagenet") else 100)
    with np.load(GOLDENS / "models" / f"{stem}.npz") as arrays:
        shapes = [str(shape) for shape in arrays["param_shapes"]]
    published = dict(zip(golden_names(f"models/{stem}", "param_names"), shapes, strict=True))
    parameters = {
        model.published_key(name): "x".join(map(str, parameter.shape))
        for name, parameter in model.named_parameters()
    }
    assert parameters == published
    buffers = set(golden_names(f"models/{stem}", "buffer_names"))
    ours = {name for name, _ in model.named_buffers() if not name.endswith("num_batches_tracked")}
    assert ours == buffers
