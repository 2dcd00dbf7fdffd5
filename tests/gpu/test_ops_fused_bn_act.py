"""The Triton kernels of BatchNorm + residual + ReLU against float64, by error budget."""

from __future__ import annotations

import math

import pytest
import torch
from fastokd.kernels import fused_bn_act as kernel
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models.layers import NormAct
from fastokd.ops import fused_bn_act, norm_act
from tests.ops.norm_cases import LEAVES, channels_last, check_budget, draw, half, run
from tests.ops.poison import poisoned

pytestmark = pytest.mark.gpu
Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(residual, relu) for residual in (False, True) for relu in (False, True)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 6 programs of tiles of 512 elements: small maps have several tiles and stretches."""
    monkeypatch.setattr(kernel, "TILE", 512)
    monkeypatch.setattr(kernel, "PROGRAMS", 6)


# Channels: one; fewer than a tile's 8 and not a power of two; a byte of bits and a ragged one; more
# than a tile's, in ragged and whole blocks. Rows: the fewest; one tile; stretches, the last one ragged.
SHAPES = [
    (2, 1, 1, 1),
    (5, 1, 7, 9),
    (3, 3, 5, 7),
    (2, 8, 3, 3),
    (9, 16, 5, 3),
    (1, 17, 1, 2),
    (3, 17, 4, 9),
    (2, 64, 4, 4),
    (2, 96, 2, 3),
    (2, 100, 5, 7),
    (3, 512, 1, 1),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, poisoned_device: torch.device) -> None:
    check_budget(draw(shape, device=poisoned_device), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "relu"), FORMS)
def test_forms(
    residual: bool, relu: bool, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    for shape in ((3, 16, 9, 7), (3, 44, 3, 5)):
        check_budget(draw(shape, dtype, residual, relu, device=poisoned_device), "triton")


# The stages of ResNet-32; ResNet-18's first and last at 224 pixels. Few images under the interpreter.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (64, 64, 112, 112), (256, 512, 7, 7)],
    ids=str,
)
def test_training_shapes(
    shape: Shape, residual: bool, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    if poisoned_device.type == "cpu":
        shape = (2, *shape[1:]) if shape[2] < 100 else (1, 8, 12, 112)
    check_budget(draw(shape, dtype, residual, device=poisoned_device), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_a_thousand_deviations_away(dtype: torch.dtype, poisoned_device: torch.device) -> None:
    """A sum of squares would keep none of the variance's digits."""
    case = draw((4, 16, 8, 8), device=poisoned_device)
    case.x = channels_last(case.x + 1000)
    case = half(case, dtype)
    if dtype == torch.float32:
        check_budget(case, "triton")
    want = case.x.double().var((0, 2, 3)) * 0.1 + 0.9
    variance = run(case, "triton")["running_var"]
    assert variance is not None
    torch.testing.assert_close(variance.double(), want, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_each_run(poisoned_device: torch.device) -> None:
    case = draw((3, 44, 9, 7), torch.bfloat16, device=poisoned_device)
    first, second = run(case, "triton"), run(case, "triton")
    for name, value in first.items():
        assert value is not None
        assert torch.equal(value, second[name]), name  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # numpy, of inf
# A weight of inf is left out: PyTorch's form on a CPU, a x + (bias - a m), gives NaN where this gives inf.
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(
            (w, v)
            for w in ("x", "residual", "grad_y", "bias")
            for v in (math.nan, math.inf, -math.inf)
        ),
        ("weight", math.nan),
    ],
)
def test_non_finite_values_go_where_torchs_go(
    where: str, value: float, poisoned_device: torch.device
) -> None:
    case = draw((3, 17, 7, 5), device=poisoned_device)
    tensor = getattr(case, where)
    if tensor.dim() == 4:
        tensor[1, 3, 2, 1] = tensor[2, 16, 6, 4] = value
    else:
        tensor[3] = value
    with poisoned(False):
        plain = run(case, "torch")
    for name, ours in run(case, "triton").items():
        theirs = plain[name]
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
        if name == "y":
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours == math.inf, theirs == math.inf)


@pytest.mark.parametrize("residual", [False, True])
def test_no_gradient_at_zero(residual: bool, poisoned_device: torch.device) -> None:
    """Where y is zero, not rounded to it: PyTorch's ReLU passes no gradient."""
    case = draw((3, 17, 7, 5), residual=residual, device=poisoned_device)
    case.weight[3] = case.bias[3] = 0
    if case.residual is not None:
        case.residual[:, 3] = 0
    out = run(case, "triton")
    for leaf in LEAVES if residual else LEAVES[:3]:
        grad = out[f"grad_{leaf}"]
        assert grad is not None
        assert not (grad[:, 3] if grad.dim() == 4 else grad[3]).any(), leaf


def test_no_gradient_where_y_underflows(poisoned_device: torch.device) -> None:
    """The mask is that of y as it is stored, with a residual and without."""
    case = draw((3, 16, 4, 4), torch.float16, device=poisoned_device)
    case.weight.fill_(1e-10)
    case.bias.fill_(1e-12)
    assert case.residual is not None
    case.residual.zero_()
    assert not run(case, "triton")["grad_residual"].any()  # type: ignore[union-attr]
    case.residual = None
    assert not run(case, "triton")["grad_bias"].any()  # type: ignore[union-attr]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("residual", "relu"), FORMS)
def test_every_subset_of_gradients(
    residual: bool, relu: bool, poisoned_device: torch.device
) -> None:
    case = draw((2, 16, 5, 4), torch.bfloat16, residual, relu, device=poisoned_device)
    names = LEAVES if residual else LEAVES[:3]
    everything = run(case, "triton")
    for bits in range(2 ** len(names)):
        ask = tuple(name for i, name in enumerate(names) if bits >> i & 1)
        out = run(case, "triton", ask)
        for name in names:
            grad = out[f"grad_{name}"]
            assert (grad is not None) == (name in ask)
            if grad is not None:
                assert torch.equal(grad, everything[f"grad_{name}"]), (ask, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["stride 0", "NCHW", "sliced"])
def test_incoming_gradient_of_any_layout(form: str, poisoned_device: torch.device) -> None:
    case = draw((3, 16, 5, 4), device=poisoned_device)
    if form == "stride 0":
        case.grad_y = torch.tensor(0.7, device=poisoned_device).expand(3, 16, 5, 4)
    elif form == "NCHW":
        case.grad_y = case.grad_y.contiguous()
    else:
        case.grad_y = torch.randn(3, 16, 5, 8, device=poisoned_device)[..., ::2]
    check_budget(case, "triton")


def test_state_over_batches_is_batchnorms(poisoned_device: torch.device) -> None:
    case = draw((3, 16, 5, 4), device=poisoned_device)
    ours, theirs = run(case, "triton", batches=3), run(case, "torch", batches=3)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert ours["num_batches_tracked"] == theirs["num_batches_tracked"] == 6


def layer(device: torch.device, **options: object) -> NormAct:
    norm = NormAct(16).to(device)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.copy_(torch.randn(16, generator=g))
    for name, value in options.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "relu"), FORMS)
def test_eval_mode(
    residual: bool, relu: bool, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    """As near to float64 as PyTorch, and no state is changed."""
    norm = layer(poisoned_device, relu=relu).eval()
    case = draw((3, 16, 9, 7), dtype, residual, device=poisoned_device)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with torch.no_grad():
        ours = norm_act(norm, case.x, case.residual, impl="triton")
        theirs = norm(case.x, case.residual)
        wide = case.to(torch.float64)
        want = norm.double()(wide.x, wide.residual)
    norm.float()
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert ours.dtype == dtype
    error, budget = (ours.double() - want).abs(), (theirs.double() - want).abs()
    assert (error <= budget.max() + 2 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()


def test_changed_state_is_noticed_by_autograd(poisoned_device: torch.device) -> None:
    norm = layer(poisoned_device)
    versions = [buffer._version for buffer in norm.buffers()]
    x = channels_last(torch.randn(2, 16, 3, 3)).to(poisoned_device)
    norm_act(norm, x, None, impl="triton")
    assert all(b._version > v for b, v in zip(norm.buffers(), versions, strict=True))


def test_second_derivative_is_refused(poisoned_device: torch.device) -> None:
    x = channels_last(torch.randn(2, 16, 3, 3)).to(poisoned_device).requires_grad_()
    y = norm_act(layer(poisoned_device), x, None, impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"training": False}, "in eval mode it has no gradient"),
        ({"momentum": None}, "momentum"),
        ({"running_mean": None, "running_var": None}, "running statistics"),
        ({"weight": None, "bias": None}, "a weight"),
        ({"dtype": torch.float64}, "float64"),
        ({"layout": "NCHW"}, "channels-last"),
        ({"residual": "NCHW"}, "residual"),
        ({"residual": "float32"}, "residual"),
        ({"batch": 0}, "empty"),
    ],
    ids=str,
)
def test_what_it_leaves_to_torch(
    change: dict[str, object], says: str, triton_device: torch.device
) -> None:
    """To the bit, and an explicit request is refused with the reason."""
    options = {k: v for k, v in change.items() if hasattr(NormAct(1), k)}
    plain, fused = layer(triton_device, **options), layer(triton_device, **options)
    x, residual = (
        channels_last(torch.randn(4, 16, 6, 6, dtype=torch.bfloat16)).to(triton_device)
        for _ in range(2)
    )
    if change.get("dtype"):
        x, residual = x.double(), residual.double()
        plain, fused = plain.double(), fused.double()
    if change.get("layout"):
        x = x.contiguous()
    if change.get("residual") == "NCHW":
        residual = residual.contiguous()
    if change.get("residual") == "float32":
        residual = residual.float()
    if change.get("batch") == 0:
        x, residual = x[:0], residual[:0]
    with pytest.raises(UserError, match=says):
        norm_act(fused, x, residual, impl="triton")
    if triton_device.type == "cuda":  # on a CPU auto may take the C++
        assert torch.equal(norm_act(fused, x, residual), plain(x, residual))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_vmap_is_left_to_torch(triton_device: torch.device) -> None:
    norms = [layer(triton_device), layer(triton_device)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    maps = torch.randn(2, 3, 16, 4, 5, device=triton_device)
    names = ("weight", "bias", "running_mean", "running_var")
    stacked = [torch.stack([getattr(norm, name).detach() for norm in norms]) for name in names]

    def call(x_BCHW: Tensor, *vectors: Tensor, impl: str = "auto") -> Tensor:
        return fused_bn_act(x_BCHW, *vectors, None, impl=impl)

    # To choose cuDNN, PyTorch queries the memory format, which a map inside of vmap lacks.
    with torch.backends.cudnn.flags(enabled=False):
        together = torch.func.vmap(call)(maps, *(value.clone() for value in stacked))
    with pytest.raises(UserError, match="vmap"):
        torch.func.vmap(lambda *args: call(*args, impl="triton"))(maps, *stacked)
    for norm, x_BCHW, y_BCHW in zip(norms, maps, together, strict=True):
        torch.testing.assert_close(y_BCHW, norm(x_BCHW), rtol=1e-5, atol=1e-5)


def test_more_elements_than_int32_counts(poisoned_device: torch.device) -> None:
    """Two halves of a map of 5 GB, the second one a copy of the first: both have the same results."""
    if poisoned_device.type == "cpu":
        pytest.skip("it needs a GPU's memory")
    B, C, side = 16, 2048, 200
    torch.manual_seed(0)
    x = torch.randn(B, C, side, side, device=poisoned_device, dtype=torch.bfloat16)
    x = channels_last(torch.cat([x, x])).requires_grad_()
    assert x.numel() > 2**31
    norm = NormAct(C).to(poisoned_device)
    y = norm_act(norm, x, x.detach(), impl="triton")
    grad_y = channels_last(torch.cat([y[:B], y[:B]]).detach())
    (grad,) = torch.autograd.grad(y, x, grad_y)
    for value in (y.detach(), grad):
        assert torch.equal(value[:B], value[B:])
        assert value[-1].isfinite().all()
    want = norm(x[:B].detach(), x[:B].detach())
    torch.testing.assert_close(y[B:].detach(), want.detach(), rtol=2e-2, atol=2e-2)


def test_the_operators_fake_results(poisoned_device: torch.device) -> None:
    if poisoned_device.type == "cpu":
        pytest.skip("the interpreter's launchers are called without the dispatcher")
    case = draw((3, 17, 5, 4), device=poisoned_device)
    state = [torch.zeros(17), torch.ones(17), torch.tensor(0)]
    moved = [tensor.to(poisoned_device) for tensor in state]
    args = (case.x, case.weight, case.bias, *moved, case.residual, True, 0.1, 1e-5)
    utils = ("test_schema", "test_faketensor")
    with poisoned(False):
        ops = torch.ops.fastokd
        torch.library.opcheck(ops.fused_bn_act.default, args, test_utils=utils)
        y, stats, bits = ops.fused_bn_act(*args)
        args = (y, case.x, bits, case.weight, stats, True, True, True)
        torch.library.opcheck(ops.fused_bn_act_backward.default, args, test_utils=utils)
        args = (case.x, case.weight, case.bias, *moved[:2], case.residual, True, 1e-5)
        torch.library.opcheck(ops.fused_bn_act_eval.default, args, test_utils=utils)
