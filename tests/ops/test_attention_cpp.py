"""The map losses in C++ against float64, on each instruction set that this CPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastokd import ops
from fastokd.errors import UserError
from fastokd.ops import cpp
from tests.ops.map_cases import LOSSES, OPS, assert_within_budget, draw, near_tie, rms, run
from tests.ops.map_edges import Edges

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("cpp_ops", "_poisoned")


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """torch.empty holds NaN: what isn't written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# 64 x 8 x 8 is FFSD's last map; 49 pixels end in a part of a vector, 13 channels and 7 x 1 pixels
# are less than one, 40 channels end in a part, 1,089 pixels are more than a block of any kind.
@pytest.mark.parametrize(
    "shape", [(2, 64, 8, 8), (3, 13, 7, 7), (1, 40, 7, 1), (2, 1, 3, 5), (1, 3, 33, 33)]
)
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(
    capability: str, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    x, y = draw(*shape, dtype=dtype, layout=layout)
    for op in OPS:
        assert_within_budget(op, x, y, "cpp", incoming=-1.7)


# The same calls each time: a budget of roundings is statistical, and once in many runs a drawn shape
# is a little beyond it.
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_call_is_within_budget(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(sorted(OPS)))
    H, W = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    assume(H * W >= 3)
    x, y = draw(
        data.draw(st.integers(0, 4)),
        data.draw(st.integers(1, 70)),
        H,
        W,
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(["last", "first"])),
        relu=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    assume(op not in ("diversity", "shifted") or not near_tie(y))
    before = cpp.capability()
    cpp.set_capability(data.draw(st.sampled_from(["default", "avx2", "avx512"])))
    try:
        asks = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
        incoming = data.draw(st.sampled_from([1.0, 0.25, -3.1]))
        assert_within_budget(op, x, y, "cpp", asks=asks, incoming=incoming)
    finally:
        cpp.set_capability(before)


@pytest.mark.parametrize("op", ["attention", "feature"])
@pytest.mark.parametrize("scale", [1.0, 1.1, 3.0, 1e-3])
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_maps_that_nearly_agree(op: str, scale: float, apart: float) -> None:
    """A difference of what is nearly the same: a rounding of u counts 1 / apart times."""
    x, noise = draw(3, 16, 8, 8, dtype=torch.float32, layout="last")
    y = scale * (x + apart * noise)
    ours, theirs = run(op, x, y, "cpp"), run(op, x, y, "torch")
    for name, exact in run(op, x.double(), y.double(), "torch").items():
        error, budget = (rms(found[name].double() - exact) for found in (ours, theirs))
        allowed = 3e-7 / apart * rms(exact)
        if op == "feature" and name == "result" and scale in (3.0, 1e-3):
            allowed += 1e-7 / x[0].numel()  # |u - v|^2 by dot products, where the norms differ
        assert error <= 1.5 * budget + allowed, name


@pytest.mark.usefixtures("capability")
def test_large_maps_that_nearly_agree() -> None:
    """A million values: summed in fp32 alone, what tells the maps apart would be lost."""
    x, noise = draw(1, 256, 64, 64, dtype=torch.float32, layout="last")
    y = 1.1 * (x + 1e-2 * noise)
    found = run("feature", x, y, "cpp", asks=(False, False))["result"]
    exact = run("feature", x.double(), y.double(), "torch", asks=(False, False))["result"]
    torch.testing.assert_close(found.double(), exact, rtol=5e-5, atol=0)


@pytest.mark.parametrize("op", ["attention", "feature"])
def test_equal_maps_have_zero_gradients(op: str) -> None:
    x, _ = draw(3, 17, 5, 7, dtype=torch.float32, layout="last")
    found = run(op, x, x.clone(), "cpp")
    assert all((v == 0).all() for v in found.values())


@pytest.mark.parametrize("op", OPS)
def test_strides(capability: str, op: str) -> None:
    """Slices, steps and broadcasts; nothing beyond a map is read."""
    x, y = draw(3, 8, 4, 5, dtype=torch.float32, layout="last")
    plain = run(op, x, y, "cpp")
    wide = torch.full((3, 4, 5, 24), math.nan).permute(0, 3, 1, 2)
    wide[:, 8:16] = x
    steps = torch.full((6, 4, 5, 8), math.nan).permute(0, 3, 1, 2)
    steps[::2] = y
    for a, b in ((x, steps[::2]), (wide[:, 8:16], y)):
        if op == "feature" and a is not x:
            continue
        for name, value in run(op, a, b, "cpp").items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    assert_within_budget(op, x[:1].expand(3, 8, 4, 5), y, "cpp")
    with pytest.raises(UserError, match="impl='cpp'"):
        run(op, x[..., ::2], y[..., ::2], "cpp")  # every other pixel of a row


@pytest.mark.parametrize("op", ["attention", "diversity"])
def test_maps_may_differ(capability: str, op: str) -> None:
    x, _ = draw(2, 6, 4, 4, dtype=torch.bfloat16, layout="last")
    _, y = draw(2, 20, 4, 4, dtype=torch.float32, layout="first")
    assert_within_budget(op, x, y, "cpp")


@pytest.mark.parametrize("op", OPS)
def test_huge_and_tiny_maps(capability: str, op: str) -> None:
    x, y = draw(2, 6, 4, 4, dtype=torch.float32, layout="last")
    for scale in (1e-9, 1e-5, 1e4, 1e8):
        assert_within_budget(op, x * scale, y, "cpp")
        assert_within_budget(op, x, y * scale, "cpp")


@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op: str) -> None:
    x, y = draw(7, 24, 8, 8, dtype=torch.float32, layout="last")
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(op, x, y, "cpp"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_fp16_gradients_under_a_scaled_loss() -> None:
    """A GradScaler's 65,536 comes in before the gradient is rounded to fp16."""
    x, y = draw(128, 16, 8, 8, dtype=torch.float16, layout="last")
    found = run("attention", x, y, "cpp", incoming=65536.0)["grad_x"]
    exact = run("attention", x.double(), y.double(), "torch", incoming=65536.0)["grad_x"]
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=6e-8)
    assert (run("attention", x, y, "cpp")["grad_x"] == 0).float().mean() > 0.3  # without it


def test_float64_is_torchs() -> None:
    x, y = draw(layout="last")
    for op in OPS:
        with pytest.raises(UserError, match="float64 is for impl='torch'"):
            run(op, x, y, "cpp")
        assert run(op, x, y, "auto")["result"].dtype == torch.float64


@pytest.mark.usefixtures("capability")
class TestEdges(Edges):
    impl = "cpp"


class TestDispatcher:
    def test_opcheck(self) -> None:
        x, y = draw(2, 5, 3, 4, dtype=torch.float32, layout="last")
        op = torch.ops.fastokd
        u, r = op.attention_map(x)
        loss, s, _ = op.attention_pair(x, y, False, True, True)
        _, saved = op.feature_pair(x, y)
        for call, args in (
            (op.attention_map, (x,)),
            (op.attention_map_backward, (x, u, r, u)),
            (op.attention_pair, (x, y, False, True, True)),
            (op.attention_pair, (x, y, True, True, False)),
            (op.attention_pair_backward, (x, s, loss)),
            (op.shifted_map, (y,)),
            (op.feature_pair, (x, y)),
            (op.feature_pair_backward, (x, y, saved, loss, True, False)),
        ):
            torch.library.opcheck(call.default, args)

    def test_compiles_into_one_graph(self) -> None:
        x, y = draw(2, 16, 4, 4, dtype=torch.float32, layout="last")

        def total(x: Tensor, y: Tensor, impl: str) -> Tensor:
            loss = torch.zeros(())
            for op in LOSSES.values():
                loss = loss + op(x, y, impl=impl)
            loss = loss + ops.attention_map(x, impl=impl).square().sum()
            return loss + ops.shifted_map(y, impl=impl).sum()

        x.requires_grad_()
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
        loss = compiled(x, y, "cpp")
        (grad,) = torch.autograd.grad(loss, x)
        expected = total(x, y, "cpp")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])
