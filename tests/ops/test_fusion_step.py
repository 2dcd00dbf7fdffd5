"""FFSD's fusion step against torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models.layers import NormAct
from fastokd.ops import fusion_step


def draw(
    m: int = 2, B: int = 3, C: int = 4, H: int = 5, W: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, nn.BatchNorm2d]:
    g = torch.Generator().manual_seed(m * 1000 + B * 100 + C * 10 + H)
    maps = [torch.randn(B, C, H, W, generator=g, dtype=torch.float64).to(dtype) for _ in range(m)]
    weight = torch.randn(m * C, 1, 3, 3, generator=g, dtype=torch.float64).to(dtype)
    bn = nn.BatchNorm2d(m * C).to(dtype)
    with torch.no_grad():
        bn.weight.copy_(torch.randn(m * C, generator=g))
        bn.bias.copy_(torch.randn(m * C, generator=g))
    return maps, weight, bn


def modules(maps: list[Tensor], weight: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """What the step is, in torch's modules."""
    K = weight.shape[0]
    conv = nn.Conv2d(K, K, 3, padding=1, groups=K, bias=False, dtype=weight.dtype)
    conv.weight = nn.Parameter(weight)
    return torch.relu(bn(conv(torch.cat(maps, 1))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_is_torchs_modules(m: int, training: bool) -> None:
    maps, weight, bn = draw(m)
    ours, theirs = bn.train(training), copy.deepcopy(bn).train(training)
    for _ in range(2):
        torch.testing.assert_close(
            fusion_step(maps, weight, ours, impl="torch"), modules(maps, weight, theirs)
        )
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("m", [1, 2])
def test_gradients(m: int) -> None:
    maps, weight, bn = draw(m, B=2, C=2, H=3)
    leaves = [t.requires_grad_() for t in (weight, bn.weight, bn.bias, *maps)]

    def step(weight: Tensor, gamma: Tensor, beta: Tensor, *maps: Tensor) -> Tensor:
        bn.weight, bn.bias = gamma, beta  # type: ignore[assignment]
        return fusion_step(list(maps), weight, bn, impl="torch")

    del bn.weight, bn.bias  # plain tensors, so that gradcheck's own reach the norm
    assert torch.autograd.gradcheck(step, leaves)


def test_maps_may_differ_in_width() -> None:
    maps, weight, bn = draw(m=1, C=6)
    split = [maps[0][:, :2], maps[0][:, 2:]]
    once = fusion_step(maps, weight, bn, impl="torch")
    torch.testing.assert_close(fusion_step(split, weight, bn, impl="torch"), once)


def test_a_norm_with_its_own_relu_is_only_its_norm() -> None:
    maps, weight, bn = draw()
    own = NormAct(8).double()
    own.load_state_dict(bn.state_dict())
    expected = fusion_step(maps, weight, bn, impl="torch")
    torch.testing.assert_close(fusion_step(maps, weight, own, impl="torch"), expected)


def test_output_keeps_the_maps_dtype() -> None:
    maps, weight, bn = draw(dtype=torch.float32)
    low = [x.bfloat16() for x in maps]
    assert fusion_step(low, weight, bn, impl="torch").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maps_BCHW": []}, "is empty"),
        ({"maps_BCHW": [torch.zeros(3, 8, 15)]}, r"maps_BCHW\[0\] is"),
        ({"maps_BCHW": [torch.zeros(3, 4, 5, 3), torch.zeros(3, 4, 3, 5)]}, r"maps_BCHW\[1\] is"),
        ({"maps_BCHW": [torch.zeros(3, 4, 5, 3), torch.zeros(3, 4, 5, 3).half()]}, "float16"),
        ({"maps_BCHW": [torch.zeros(3, 7, 5, 3)]}, r"it must be \[7, 1, 3, 3\]"),
        ({"bn": nn.BatchNorm2d(7)}, "bn has 7 channels"),
        ({"maps_BCHW": [torch.zeros(1, 8, 1, 1)]}, "needs at least 2"),
        ({"impl": "triton"}, "needs a GPU"),
        ({"impl": "cpp"}, "on a CPU it is left to PyTorch"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], says: str) -> None:
    maps, weight, bn = draw()
    with pytest.raises(UserError, match=says):
        fusion_step(**{"maps_BCHW": maps, "weight_K133": weight, "bn": bn, **change})  # type: ignore[arg-type]


def test_a_norm_that_stopped_tracking_keeps_its_statistics(cpp_ops: None) -> None:
    maps, weight, bn = draw(dtype=torch.float32)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    bn.track_running_stats = False
    theirs = copy.deepcopy(bn)
    torch.testing.assert_close(fusion_step(maps, weight, bn), modules(maps, weight, theirs))
    for key, value in theirs.state_dict().items():
        assert torch.equal(bn.state_dict()[key], value)
