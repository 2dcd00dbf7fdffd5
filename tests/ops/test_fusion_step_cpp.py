"""The fusion step in C++ against float64, on each instruction set that this CPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.ops import _cpp, fusion_step
from tests.ops.fusion_cases import assert_within_budget, copied, draw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("cpp_ops", "_poisoned")


@pytest.fixture(params=["default", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest, cpp_ops: None) -> Iterator[str]:
    before = _cpp.capability()
    if not _cpp.set_capability(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _cpp.set_capability(before)


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """torch.empty holds NaN: what isn't written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Two students' last maps; one map, as the transfusion's; less than a cell of channels; a cell and a
# part; images of one column and of one row.
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 32, 8, 8), (1, 2, 16, 7, 7), (3, 2, 5, 4, 3), (2, 2, 20, 5, 1), (1, 3, 1, 1, 6)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(
    capability: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    for need_maps in (True, False):
        assert_within_budget(draw(*shape, dtype=dtype), "cpp", need_maps)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_any_call_is_within_budget(data: st.DataObject) -> None:
    m, B, C = (data.draw(st.integers(1, n)) for n in (4, 4, 40))
    H, W = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    assume(B * H * W >= 8)  # of fewer values a variance may be next to nothing
    step = draw(
        *(m, B, C, H, W),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 99)),
    )
    before = _cpp.capability()
    _cpp.set_capability(data.draw(st.sampled_from(["default", "avx2", "avx512"])))
    try:
        assert_within_budget(step, "cpp", data.draw(st.booleans()))
    finally:
        _cpp.set_capability(before)


def test_mean_a_thousand_deviations_from_zero(capability: str) -> None:
    assert_within_budget(draw(2, 4, 8, 6, 6, offset=1000.0), "cpp")


def test_slices_of_wider_maps(capability: str) -> None:
    step = draw(2, 3, 16, 4, 4)
    expected = step.run("cpp")
    wide = torch.full((3, 4, 4, 48), math.nan).permute(0, 3, 1, 2)
    wide[:, 0:16], wide[:, 32:48] = step.maps
    step.maps[:] = [wide[:, 0:16], wide[:, 32:48]]
    for name, value in step.run("cpp").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_nan_goes_through(capability: str) -> None:
    """To the whole channel, by its statistics; to no other channel."""
    step = draw(2, 3, 4, 4, 4)
    step.maps[1][1, 2, 0, 0] = math.nan  # channel 6 of 8
    found = step.run("cpp")
    for name in ("y", "grad_weight", "grad_gamma", "running_mean"):
        channels = found[name].movedim(1 if name == "y" else 0, 0).flatten(1 if name == "y" else 0)
        broken = channels.reshape(8, -1).isnan().any(1)
        assert broken.tolist() == [k == 6 for k in range(8)], name


def test_threads_change_nothing() -> None:
    step = draw(2, 7, 24, 8, 8)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(step.run("cpp"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("eval", "eval mode"),
        ("cumulative", "a momentum"),
        ("first", "not channels-last"),
        ("mixed", "differ in width or layout"),
        ("double", "float64 is for"),
        ("bfloat16 norm", "float32"),
    ],
)
def test_what_it_cannot_take_is_named_and_left_to_torch(change: str, says: str) -> None:
    step = draw(2, 3, 4, 5, 5, dtype=torch.float64 if change == "double" else torch.float32)
    bn = copied(step.bn).to(step.maps[0].dtype)
    if change == "eval":
        bn.eval()
    elif change == "cumulative":
        bn.momentum = None
    elif change == "first":
        step.maps[:] = [x.contiguous() for x in step.maps]
    elif change == "mixed":
        step.maps[:] = [step.maps[0], step.maps[1].contiguous()]
    elif change == "bfloat16 norm":
        bn.to(torch.bfloat16)
    with pytest.raises(UserError, match=says):
        fusion_step(step.maps, step.weight, bn, impl="cpp")
    if change != "bfloat16 norm":
        expected = fusion_step(step.maps, step.weight, copied(bn).train(bn.training), impl="torch")
        auto = fusion_step(step.maps, step.weight, copied(bn).train(bn.training))
        torch.testing.assert_close(auto, expected)


def test_opcheck() -> None:
    step = draw(2, 2, 5, 3, 4)
    bn = step.bn.requires_grad_(False)
    forward = torch.ops.fastokd.fusion_step.default
    statistics = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    args = (step.maps, step.weight, bn.weight, bn.bias, *statistics, 0.1, 1e-5)
    torch.library.opcheck(forward, args)
    _, z, saved = forward(*args)
    backward = torch.ops.fastokd.fusion_step_backward.default
    for need_maps in (True, False):
        args = (step.dy, step.maps, step.weight, bn.weight, bn.bias, z, saved, need_maps)
        torch.library.opcheck(backward, args)


def test_compiles_into_one_graph() -> None:
    step = draw(2, 2, 4, 3, 4)

    def total(maps: list[Tensor], weight: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return (fusion_step(maps, weight, bn, impl="cpp") * step.dy).sum()

    weight = step.weight.requires_grad_()
    ours, theirs = copied(step.bn), copied(step.bn)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(step.maps, weight, ours), total(step.maps, weight, theirs)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, [weight, ours.weight]),
        torch.autograd.grad(expected, [weight, theirs.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
