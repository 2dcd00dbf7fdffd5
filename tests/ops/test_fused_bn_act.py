"""BatchNorm + residual + ReLU as one: PyTorch's numbers, state, NaN and gradients, in C++.

The Triton form's tests are in ``tests/gpu/test_ops_fused_bn_act.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.models.layers import NormAct
from fastokd.ops import cpp, fused_bn_act, norm_act
from tests.ops.norm_cases import LEAVES, channels_last, check_budget, draw, half, run

NAMES = ("default", "avx2", "avx512", "avx512bf16")


pytestmark = pytest.mark.usefixtures("cpp_ops")


@pytest.fixture
def capabilities(cpp_ops: None) -> Iterator[list[str]]:
    """Those that this processor has; the one that was in force comes back afterwards."""
    before = cpp.capability()
    yield [name for name in NAMES if cpp.set_capability(name)]
    cpp.set_capability(before)


# Channels: one; fewer than a register has; the narrow layers; not a multiple of a register; wide.
# Rows: the fewest, a ragged few, several blocks (32,768 elements, 128 rows) and a ragged last one.
SHAPES = [
    (2, 1, 1, 1),
    (5, 1, 93, 89),
    (3, 3, 5, 7),
    (2, 8, 3, 3),
    (9, 16, 17, 15),
    (1, 17, 1, 2),
    (3, 17, 31, 23),
    (2, 24, 9, 5),
    (5, 64, 13, 11),
    (2, 100, 5, 7),
    (1, 100, 19, 23),
    (2, 512, 1, 1),
    (3, 512, 10, 9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
class TestBudget:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_capability(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, capabilities: list[str]
    ) -> None:
        case = draw(shape, dtype)
        for name in capabilities:
            cpp.set_capability(name)
            check_budget(case, "cpp")

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("residual", [False, True])
    def test_forms(
        self, residual: bool, relu: bool, dtype: torch.dtype, capabilities: list[str]
    ) -> None:
        """Each form has loops of its own: in a tile's width, in several tiles', in ragged rows."""
        for shape in ((3, 16, 9, 7), (3, 96, 7, 5)):
            case = draw(shape, dtype, residual=residual, relu=relu)
            for name in capabilities:
                cpp.set_capability(name)
                check_budget(case, "cpp")

    def test_mean_a_thousand_deviations_away(
        self, dtype: torch.dtype, capabilities: list[str]
    ) -> None:
        """A sum of squares would keep none of the variance's digits."""
        case = draw((8, 16, 24, 24), torch.float32)
        case.x = channels_last((case.x.double() + 1000).to(dtype))
        for name in capabilities:
            cpp.set_capability(name)
            if dtype == torch.float32:
                check_budget(case, "cpp")
            fast = run(case if dtype == torch.float32 else half(case), "cpp")
            want = case.x.double().var((0, 2, 3)) * 0.1 + 0.9
            assert fast["running_var"] is not None
            torch.testing.assert_close(fast["running_var"].double(), want, rtol=1e-5, atol=0)


@given(
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(C: int, B: int, H: int, W: int, bf16: bool, residual: bool, relu: bool) -> None:
    shape = (max(B, 2), C, H, W)
    check_budget(draw(shape, torch.bfloat16 if bf16 else torch.float32, residual, relu), "cpp")


def test_result_does_not_depend_on_threads() -> None:
    case = draw((6, 16, 40, 40), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, "cpp")
        torch.set_num_threads(3)
        three = run(case, "cpp")
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        assert value is not None
        assert torch.equal(value, three[name]), name  # type: ignore[arg-type]


def test_nothing_is_left_unwritten() -> None:
    """New tensors are NaN here before they are written."""
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((3, 17, 31, 23), (9, 16, 17, 15)):
            for dtype in (torch.float32, torch.bfloat16):
                check_budget(draw(shape, dtype), "cpp")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["x", "residual", "grad_y", "weight", "bias"])
def test_non_finite_values_go_where_torchs_go(
    where: str, dtype: torch.dtype, value: float, capabilities: list[str]
) -> None:
    case = draw((3, 17, 7, 5), dtype)
    tensor = getattr(case, where)
    if tensor.dim() == 4:
        # Among the rows that AVX-512 takes 64 at a time, and among the 41 that are left.
        tensor[1, 3, 2, 1] = tensor[2, 16, 6, 4] = value
    else:
        tensor[3] = value
    plain = run(case, "torch")
    for name in capabilities:
        cpp.set_capability(name)
        for key, ours in run(case, "cpp").items():
            theirs = plain[key]
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.isfinite(), theirs.isfinite()), (name, key)
            if not key.startswith("grad"):
                assert torch.equal(ours.isnan(), theirs.isnan()), (name, key)
                assert torch.equal(ours == math.inf, theirs == math.inf), (name, key)


@pytest.mark.parametrize("residual", [False, True])
def test_no_gradient_at_zero(residual: bool, capabilities: list[str]) -> None:
    """Where y is zero, not rounded to it: PyTorch's ReLU lets nothing through."""
    case = draw((3, 17, 7, 5), residual=residual)
    case.weight[3] = case.bias[3] = 0
    if case.residual is not None:
        case.residual[:, 3] = 0
    for name in capabilities:
        cpp.set_capability(name)
        out = run(case, "cpp")
        for leaf in LEAVES if residual else LEAVES[:3]:
            grad = out[f"grad_{leaf}"]
            assert grad is not None
            assert not (grad[:, 3] if grad.dim() == 4 else grad[3]).any(), (name, leaf)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_subset_of_gradients(relu: bool, residual: bool) -> None:
    case = draw((3, 16, 5, 4), torch.bfloat16, residual=residual, relu=relu)
    names = LEAVES if residual else LEAVES[:3]
    everything = run(case, "cpp")
    for bits in range(2 ** len(names)):
        ask = tuple(name for i, name in enumerate(names) if bits >> i & 1)
        out = run(case, "cpp", ask)
        for name in names:
            grad = out[f"grad_{name}"]
            if name in ask:
                assert grad is not None
                assert torch.equal(grad, everything[f"grad_{name}"]), (ask, name)  # type: ignore[arg-type]
            else:
                assert grad is None


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("form", ["stride 0", "NCHW", "sliced"])
def test_incoming_gradient_of_any_layout(form: str, relu: bool) -> None:
    """As the same values in channels-last order, to the bit."""
    case = draw((3, 16, 5, 4), relu=relu)
    if form == "stride 0":
        case.grad_y = torch.tensor(0.75).expand(3, 16, 5, 4)
    elif form == "NCHW":
        case.grad_y = case.grad_y.contiguous()
    else:
        case.grad_y = torch.randn(3, 16, 5, 8)[..., ::2]
    given = run(case, "cpp")
    case.grad_y = channels_last(case.grad_y)
    for name, wanted in run(case, "cpp").items():
        assert wanted is not None
        assert torch.equal(given[name], wanted), name  # type: ignore[arg-type]


def test_state_over_batches_is_batchnorms() -> None:
    case = draw((3, 16, 5, 4))
    ours, theirs = run(case, "cpp", batches=3), run(case, "torch", batches=3)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert ours["num_batches_tracked"] == theirs["num_batches_tracked"] == 6


@pytest.mark.parametrize(
    ("level", "shape", "relu", "fused"),
    [
        ("avx2", (16, 256, 16, 16), True, False),
        ("avx2", (16, 128, 32, 16), True, True),
        ("avx2", (16, 64, 32, 32), False, False),
        ("avx2", (16, 512, 7, 7), True, True),  # small
        ("avx512", (16, 256, 16, 16), True, True),
    ],
)
def test_without_avx512_large_fp32_maps_are_left_to_torch(
    level: str,
    shape: tuple[int, int, int, int],
    relu: bool,
    fused: bool,
    capabilities: list[str],
) -> None:
    if level not in capabilities:
        pytest.skip(f"this CPU has no {level}")
    cpp.set_capability(level)
    case = draw(shape, residual=False, relu=relu)
    ours = run(case, "auto")["y"]
    for impl in ("torch", "cpp"):
        same = torch.equal(ours, run(case, impl)["y"])
        assert same == ((impl == "cpp") == fused)


class TestTheHook:
    def layers(self, **options: object) -> tuple[NormAct, NormAct]:
        torch.manual_seed(1)
        plain, fused = NormAct(16), NormAct(16)
        for layer in (plain, fused):
            for name, value in options.items():
                setattr(layer, name, value)
        fused.impl = "auto"
        return plain, fused

    @pytest.mark.parametrize("relu", [False, True])
    def test_under_autocast(self, relu: bool) -> None:
        """The convolution's map is bf16 and the layer's own state fp32."""
        plain, fused = self.layers(relu=relu)
        conv = nn.Conv2d(3, 16, 3, padding=1).to(memory_format=torch.channels_last)
        images = channels_last(torch.rand(4, 3, 8, 8))
        with torch.autocast("cpu", torch.bfloat16):
            x = conv(images)
            ours, theirs = fused(x, x), plain(x, x)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("residual", "relu"), [(False, True), (True, True), (False, False)])
    def test_eval_mode(self, residual: bool, relu: bool, dtype: torch.dtype) -> None:
        """As near to float64 as PyTorch, and no state is changed."""
        plain, fused = (layer.eval() for layer in self.layers(relu=relu))
        with torch.no_grad():
            for layer in (plain, fused):
                layer.running_mean.copy_(torch.linspace(-2, 2, 16))
                layer.running_var.copy_(torch.linspace(0.1, 3, 16))
        before = {name: value.clone() for name, value in fused.state_dict().items()}
        case = draw((3, 16, 9, 7), dtype, residual)
        with torch.no_grad():
            ours, theirs = (layer(case.x, case.residual) for layer in (fused, plain))
            wide = case.to(torch.float64)
            want = plain.double()(wide.x, wide.residual)
        torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        error, budget = (ours.double() - want).abs(), (theirs.double() - want).abs()
        assert (error <= budget.max() + 2 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"training": False}, "in eval mode it has no gradient"),
            ({"momentum": None}, "momentum"),
            ({"running_mean": None, "running_var": None}, "running statistics"),
            ({"weight": None, "bias": None}, "a weight"),
            ({"float64": True}, "float64"),
            ({"nchw": True}, "channels-last"),
            ({"residual": "NCHW"}, "residual"),
            ({"residual": "float32"}, "residual"),
            ({"empty": True}, "empty"),
        ],
        ids=str,
    )
    def test_what_it_leaves_to_torch(self, change: dict[str, object], says: str) -> None:
        """To the bit, and an explicit request is refused with the reason."""
        options = {k: v for k, v in change.items() if hasattr(NormAct(1), k)}
        plain, fused = self.layers(**options)
        x = channels_last(torch.randn(4, 16, 6, 6)).bfloat16()
        residual = channels_last(torch.randn(4, 16, 6, 6)).bfloat16()
        if change.get("float64"):
            x, residual = x.double(), residual.double()
            plain, fused = plain.double(), fused.double()
        if change.get("nchw"):
            x = x.contiguous()
        if change.get("residual") == "NCHW":
            residual = residual.contiguous()
        if change.get("residual") == "float32":
            residual = residual.float()
        if change.get("empty"):
            x, residual = x[:0], residual[:0]
        ours, theirs = fused(x, residual), plain(x, residual)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)
        with pytest.raises(UserError, match=says):
            norm_act(fused, x, residual, impl="cpp")


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_BCHW": torch.zeros(4, 16)}, "x_BCHW is torch.float32 of shape \\[4, 16\\]"),
        ({"x_BCHW": torch.zeros(4, 16, 3, 3, dtype=torch.long)}, "x_BCHW is torch.int64"),
        ({"x_BCHW": torch.zeros(1, 16, 1, 1)}, "one value a channel"),
        ({"weight_C": torch.zeros(15)}, "weight_C has shape \\[15\\]"),
        ({"bias_C": torch.zeros(16, 1)}, "bias_C has shape"),
        ({"running_mean_C": torch.zeros(17)}, "running_mean_C has shape"),
        ({"running_var_C": None}, "both or neither"),
        ({"residual_BCHW": torch.zeros(4, 16, 3, 1)}, "residual_BCHW has shape"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], says: str, impl: str) -> None:
    vectors = {
        name: torch.ones(16) for name in ("weight_C", "bias_C", "running_mean_C", "running_var_C")
    }
    arguments = {"x_BCHW": channels_last(torch.zeros(4, 16, 3, 3)), **vectors, **change}
    with pytest.raises(UserError, match=says):
        fused_bn_act(num_batches_tracked=None, impl=impl, **arguments)  # type: ignore[arg-type]


def operands(requires_grad: bool = False, residual: bool = True) -> list[object]:
    """What the registered operator takes, in order."""
    case = draw((3, 16, 5, 4))
    leaves = [case.x, case.weight, case.bias]
    for leaf in leaves:
        leaf.requires_grad_(requires_grad)
    add = case.residual if residual else None
    return [*leaves, torch.zeros(16), torch.ones(16), torch.tensor(0), add, True, 0.1, 1e-5]


@pytest.mark.parametrize(
    ("position", "bad"),
    [
        (0, torch.zeros(3, 16, 5, 4)),  # not channels-last
        (0, channels_last(torch.zeros(3, 16, 5, 4, dtype=torch.half))),
        (0, torch.zeros(1, 16, 1, 1)),
        (1, torch.zeros(15)),
        (2, torch.zeros(16, dtype=torch.bfloat16)),
        (3, torch.zeros(32)[::2]),
        (4, torch.zeros(16, 1)),
        (5, torch.tensor(0.0)),
        (5, torch.zeros(0, dtype=torch.long)),
        (6, torch.zeros(3, 16, 4, 5)),
        (6, torch.zeros(3, 16, 5, 4, dtype=torch.bfloat16)),
    ],
)
def test_the_operator_itself_refuses(position: int, bad: Tensor) -> None:
    """The public function has checked by then; whoever calls the operator gets no crash either."""
    arguments = operands()
    arguments[position] = bad
    with pytest.raises(RuntimeError, match="fused_bn_act"):
        torch.ops.fastokd.fused_bn_act(*arguments)


# The checker itself reads the .grad of copies that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(requires_grad: bool, residual: bool) -> None:
    arguments = operands(requires_grad, residual)
    torch.library.opcheck(torch.ops.fastokd.fused_bn_act.default, arguments)
    x, weight = (a.detach() for a in arguments[:2])  # type: ignore[attr-defined]
    y, stats, _ = torch.ops.fastokd.fused_bn_act(*operands())
    backward = torch.ops.fastokd.fused_bn_act_backward.default
    torch.library.opcheck(
        backward,
        (torch.ones_like(y), x, y if residual else None, weight, stats, True, True, residual),
    )


def test_backward_refuses_other_tensors() -> None:
    x, weight = operands()[:2]
    y, stats, _ = torch.ops.fastokd.fused_bn_act(*operands())
    good = [torch.ones_like(y), x, y, weight, stats, True, True, True]
    for position, bad in ((0, y[:2]), (2, y.bfloat16()), (3, weight[:3]), (4, stats[:3])):  # type: ignore[index]
        arguments = [*good]
        arguments[position] = bad
        with pytest.raises(RuntimeError, match="fused_bn_act"):
            torch.ops.fastokd.fused_bn_act_backward(*arguments)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_into_one_graph(residual: bool) -> None:
    layer = NormAct(16)
    layer.impl = "auto"
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    case = draw((3, 16, 5, 4), residual=residual)
    x = case.x.requires_grad_()

    def loss() -> Tensor:
        return (layer(x, case.residual) * case.grad_y).sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        layer.load_state_dict(state)
        value = call()
        grads = torch.autograd.grad(value, [x, layer.weight, layer.bias])
        results.append([value.detach(), *grads, *(v.clone() for v in layer.state_dict().values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 1


def test_changed_state_is_noticed_by_autograd() -> None:
    """Counters of in-place changes go up, as they do for PyTorch's own in-place operations."""
    layer = NormAct(16)
    versions = [b._version for b in layer.buffers()]
    norm_act(layer, channels_last(torch.randn(2, 16, 3, 3)), None)
    assert all(b._version > v for b, v in zip(layer.buffers(), versions, strict=True))


def test_second_derivative_is_refused() -> None:
    case = draw((2, 4, 3, 3), residual=False)
    x = case.x.requires_grad_()
    y = fused_bn_act(x, case.weight, case.bias, torch.zeros(4), torch.ones(4), None, impl="cpp")
    (grad,) = torch.autograd.grad((y * case.grad_y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grad.sum(), x)


def test_torch_impl_is_batchnorm_add_relu() -> None:
    case = draw((3, 16, 5, 4)).to(torch.float64)
    layer = nn.BatchNorm2d(16).double()
    assert case.residual is not None
    y = F.relu(layer(case.x) + case.residual)
    ours = fused_bn_act(
        case.x,
        torch.ones(16).double(),
        torch.zeros(16).double(),
        state_mean := torch.zeros(16).double(),
        torch.ones(16).double(),
        None,
        residual_BCHW=case.residual,
        impl="torch",
    )
    assert torch.equal(ours, y)
    assert torch.equal(state_mean, layer.running_mean)  # type: ignore[arg-type]


def test_the_gradient_in_cpp_is_for_a_cpu_alone() -> None:
    """It saves y, where the Triton form saves the mask's bits."""
    unavailable = cpp.load()
    assert unavailable is None, unavailable
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("fastokd::fused_bn_act", "AutogradCPU")
    assert not has("fastokd::fused_bn_act", "AutogradCUDA")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in make_dual
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_is_torchs(cpp_ops: None, training: bool) -> None:
    x, tangent = (channels_last(torch.randn(2, 16, 4, 4)) for _ in range(2))
    state = (torch.ones(16), torch.zeros(16), torch.zeros(16), torch.ones(16), torch.tensor(0))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = fused_bn_act(dual, *state, training=training)
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert found is not None
    assert found.abs().sum() > 0
