"""The Triton kernels of DKD and DIST against float64, by error budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fastokd.kernels import correlation_distillation, decoupled_distillation

from tests.ops.target_cases import Drawn, assert_within_budget, losses, outcome
from tests.ops.target_cases import draw as draw_case

pytestmark = pytest.mark.gpu
OPS = ("decoupled", "correlation")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Draw = Callable[..., Drawn]


@pytest.fixture(autouse=True)
def few_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is that of the operations, not of their sizes."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(correlation_distillation, "CLASSES", 256)


@pytest.fixture
def draw(poisoned_device: torch.device) -> Draw:
    """Draws a call where the kernels run."""
    return partial(draw_case, device=poisoned_device)


# Two classes; ragged rows of ten, of 101 for students with targets of their own.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 3, 2, 1), (3, 2, 10, 1), (2, 2, 101, 2)])
def test_shapes(op: str, shape: tuple[int, int, int, int], draw: Draw) -> None:
    S, B, C, targets = shape
    assert_within_budget(op, draw(S, B, C, targets=targets), "triton")


# CIFAR-100's and ImageNet's batches; few images under the interpreter, which takes one at a time.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("B", "C", "dtype"), [*((64, 100, dtype) for dtype in DTYPES), (256, 1000, torch.bfloat16)]
)
def test_training_shapes(
    op: str, B: int, C: int, dtype: torch.dtype, draw: Draw, triton_device: torch.device
) -> None:
    S = 4
    if triton_device.type == "cpu":
        S, B = 1, 3
    # In fp16 small gradients would round to 0.
    incoming = 256.0 if dtype == torch.float16 else 1.0
    assert_within_budget(op, draw(S, B, C, dtype=dtype), "triton", incoming=incoming)


@pytest.mark.parametrize("op", OPS)
def test_sweeps(op: str, monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    """Classes in two full blocks and a ragged one; samples in a full tile and a ragged one."""
    for module in (decoupled_distillation, correlation_distillation):
        monkeypatch.setattr(module, "block_and_warps", lambda *_: (32, 1))
    monkeypatch.setattr(correlation_distillation, "SAMPLES", 2)
    assert_within_budget(op, draw(1, 3, 70), "triton")


def test_more_students_than_share_a_program(monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    monkeypatch.setattr(decoupled_distillation, "SHARING", 1)
    assert_within_budget("decoupled", draw(2, 2, 10), "triton")


@pytest.mark.parametrize("op", OPS)
def test_rows_of_wider_memory(op: str, draw: Draw) -> None:
    """Slices, one target by a stride of 0, labels from a wider tensor; nothing beyond is read."""
    z_SBC, t_SBC, labels_B = draw(2, 3, 10)
    wide_SBC = torch.full((2, 3, 12), math.nan, device=z_SBC.device)
    wide_SBC[..., 1:11] = z_SBC
    t_SBC, labels_B2 = t_SBC.expand(2, -1, -1), labels_B[:, None].expand(-1, 2).contiguous()
    assert_within_budget(op, Drawn(wide_SBC[..., 1:11], t_SBC, labels_B2[:, 0]), "triton")


@pytest.mark.parametrize("op", OPS)
def test_without_samples_and_without_gradient(op: str, draw: Draw) -> None:
    loss_S, gradient_SBC = outcome(op, draw(2, 0, 4), "triton")
    assert (loss_S == 0).all()
    assert gradient_SBC.shape == (2, 0, 4)
    drawn = draw(2, 2, 5)
    torch.testing.assert_close(losses(op, drawn, "triton"), losses(op, drawn, "torch"))


def test_labels_out_of_range_are_nan_for_their_sample(draw: Draw) -> None:
    drawn = draw(2, 4, 6)
    drawn.labels_B[1:3] = torch.tensor([6, -1])
    loss_S, gradient_SBC = outcome("decoupled", drawn, "triton")
    assert loss_S.isnan().all()
    assert gradient_SBC[:, 1:3].isnan().all()
    assert gradient_SBC[:, [0, 3]].isfinite().all()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")  # numpy
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [200.0, -200.0, math.inf, -math.inf, math.nan])
def test_edges(op: str, value: float, draw: Draw) -> None:
    """A label's logit, and another one: losses and gradients are as the reference's, NaN included."""
    for whose in range(2):
        z_SBC, t_SBC, labels_B = draw(1, 3, 6)
        labels_B[:] = 1
        x_BC = (z_SBC, t_SBC)[whose][0]
        x_BC[0, 1] = x_BC[1, 3] = value
        exact = Drawn(z_SBC.double(), t_SBC.double(), labels_B)
        ours = outcome(op, Drawn(z_SBC, t_SBC, labels_B), "triton", temperature=1.0)
        theirs = [x.float() for x in outcome(op, exact, "torch", temperature=1.0)]
        torch.testing.assert_close([*ours], theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")  # numpy
@pytest.mark.parametrize("op", OPS)
def test_a_block_of_classes_at_minus_infinity(op: str, draw: Draw) -> None:
    """Read in blocks of 1,024 classes, whose sums are merged."""
    z_SBC, t_SBC, labels_B = draw(1, 2, 3100)
    z_SBC[..., 1024:2048] = -math.inf
    labels_B[:] = 1
    exact = Drawn(z_SBC.double(), t_SBC.double(), labels_B)
    ours = outcome(op, Drawn(z_SBC, t_SBC, labels_B), "triton")
    theirs = [x.float() for x in outcome(op, exact, "torch")]
    torch.testing.assert_close([*ours], theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_what_is_constant_correlates_with_nothing(draw: Draw) -> None:
    """One sample: every class is constant over the batch. One class: every sample is."""
    for B, C in ((1, 6), (2, 1)):
        weights = {"beta": 0.0 if B == 1 else 1.0, "gamma": 1.0 if B == 1 else 0.0}
        loss_S, gradient_SBC = outcome("correlation", draw(2, B, C), "triton", **weights)
        torch.testing.assert_close(loss_S, torch.full_like(loss_S, 4.0))
        assert not gradient_SBC.any()


def test_the_same_bits_again(draw: Draw) -> None:
    for op in OPS:
        found, again = (outcome(op, draw(1, 2, 10), "triton") for _ in range(2))
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
