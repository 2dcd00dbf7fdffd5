"""Convolutions in bfloat16 and their gradients against float64, and where torch's are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastokd.cohort import Cohort
from fastokd.models.layers import NormAct
from fastokd.ops import cpp
from fastokd.ops.conv import conv2d, conv_transpose2d, suits

LAST = torch.channels_last

# (B, C, O, H, W, kernel, stride, padding), and why.
CASES = {
    "first stage": (3, 16, 16, 32, 32, 3, 1, 1),
    "second stage": (2, 32, 32, 16, 16, 3, 1, 1),
    "third stage": (5, 64, 64, 8, 8, 3, 1, 1),
    "between stages": (3, 16, 32, 32, 32, 3, 2, 1),
    "four branches' first": (2, 32, 256, 16, 16, 3, 2, 1),
    "their shortcut": (2, 32, 256, 16, 16, 1, 2, 0),
    "a wide shortcut": (2, 64, 128, 8, 8, 1, 1, 0),
    "a narrow shortcut": (2, 16, 16, 6, 6, 1, 1, 0),
    "odd sides": (2, 48, 16, 7, 5, 3, 1, 1),
    "odd sides, stride 2": (1, 16, 48, 9, 11, 3, 2, 1),
    "no padding": (2, 16, 16, 5, 6, 3, 1, 0),
    "one place": (2, 16, 16, 1, 1, 3, 1, 1),
    "many rows a strip": (1, 16, 16, 70, 3, 3, 1, 1),
    "no image": (0, 16, 16, 8, 8, 3, 1, 1),
    "a row of 24": (3, 16, 48, 5, 24, 3, 1, 1),
    "outputs of 16, a row of 8": (2, 48, 16, 3, 8, 3, 1, 1),
    "one row": (2, 32, 64, 1, 8, 3, 1, 1),
    "halved to one row": (2, 16, 16, 2, 16, 3, 2, 1),
    "halved to a row of 16": (3, 16, 16, 6, 32, 3, 2, 1),
    "halved, odd height": (2, 16, 32, 7, 16, 3, 2, 1),
    "halved, no padding": (2, 16, 16, 8, 16, 3, 2, 0),
    "blocks of three sizes": (3, 80, 144, 4, 4, 3, 1, 1),
    "wide, halved": (2, 128, 256, 6, 6, 3, 2, 1),
    "a wide, halved shortcut": (3, 128, 256, 7, 5, 1, 2, 0),
    "1x1, padding": (2, 16, 32, 5, 4, 1, 2, 3),
    "rows a strip can't hold": (3, 64, 64, 56, 56, 3, 1, 1),
    "several images a strip": (9, 32, 32, 3, 3, 3, 1, 1),
}


@pytest.fixture(autouse=True)
def bf16(cpp_ops: None) -> None:
    if not cpp.set_capability("avx512bf16"):
        pytest.skip("this CPU has no AVX-512 BF16: the kernel runs nowhere else")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=LAST)


def step(x: Tensor, w: Tensor, b: Tensor | None, y_grad: Tensor, geometry: tuple[int, int], **how):  # type: ignore[no-untyped-def]
    """The output and the gradients of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b) if t is not None]
    y = conv2d(*leaves, *[None] * (3 - len(leaves)), *geometry, **how)
    y.backward(y_grad)
    return y, *[leaf.grad for leaf in leaves]


@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_torch(case: str) -> None:
    B, C, outputs, H, W, kernel, stride, padding = CASES[case]
    x, w = (
        drawn(B, C, H, W),
        (0.1 * torch.randn(outputs, C, kernel, kernel)).contiguous(memory_format=LAST),
    )
    shape = F.conv2d(x.float(), w, None, stride, padding).shape
    y_grad = drawn(*shape)
    y, x_grad, w_grad = step(x, w, None, y_grad, (stride, padding))
    assert y.grad_fn is not None
    assert "Conv2d" in y.grad_fn.name()
    wide = (x.double(), w.bfloat16().double())
    y_exact, x_exact, exact = step(*wide, None, y_grad.double(), (stride, padding), impl="torch")
    for found, right in ((y, y_exact), (x_grad, x_exact)):
        assert found.shape == right.shape
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous(memory_format=LAST)
        # Rounded once, to 8 bits, from a float32 sum.
        torch.testing.assert_close(found.double(), right, rtol=2**-8, atol=1e-5)
    assert w_grad.dtype == torch.float32
    assert w_grad.shape == w.shape
    # Float32 sums of B * OH * OW exact products.
    bound = 1e-5 * (y_grad.numel() / outputs) ** 0.5 + 1e-6
    torch.testing.assert_close(w_grad.double(), exact, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("shape", [(3, 64, 32, 8, 8), (2, 32, 16, 3, 4), (1, 16, 48, 5, 3)])
def test_a_decoders_step(shape: tuple[int, ...]) -> None:
    B, C, outputs, H, W = shape
    x, w = drawn(B, C, H, W), (0.1 * torch.randn(C, outputs, 3, 3)).contiguous(memory_format=LAST)
    y_grad = drawn(B, outputs, 2 * H, 2 * W)
    found, exact = [], []
    for results, impl, leaves in (
        (found, "auto", (x.clone(), w.clone())),
        (exact, "torch", (x.double(), w.bfloat16().double())),
    ):
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
        y = conv_transpose2d(*leaves, impl=impl)
        y.backward(y_grad.to(y.dtype))
        results += [y, leaves[0].grad, leaves[1].grad]
        assert y.grad_fn is not None
        assert ("ConvTranspose2d" in y.grad_fn.name()) == (impl == "auto")
    for ours, right in zip(found[:2], exact[:2], strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(ours.double(), right, rtol=2**-8, atol=1e-5)
    assert found[2].dtype == torch.float32
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # as a decoder teaches
        assert torch.equal(conv_transpose2d(x, w), found[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("C", [16, 96, 208])
def test_any_number_of_threads(threads: int, C: int) -> None:
    before = torch.get_num_threads()
    x, w, y_grad = drawn(7, C, 8, 8), torch.randn(C, C, 3, 3), drawn(7, C, 8, 8)
    expected = step(x, w, None, y_grad, (1, 1))[2]
    torch.set_num_threads(threads)
    try:
        found = step(x, w, None, y_grad, (1, 1))[2]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_fake_tensors_are_never_read() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 16, 8, 8, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=LAST).requires_grad_()
        w = torch.empty(32, 16, 3, 3, requires_grad=True)
        y = torch.ops.fastokd.conv2d(x, w, 1, 1)
        z = torch.ops.fastokd.conv_transpose2d(y, w)
        z.sum().backward()
        assert (y.shape, z.shape) == ((2, 32, 8, 8), (2, 16, 16, 16))
        assert x.grad is not None
        assert w.grad is not None
        assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)


def test_what_looks_on_sees_every_product() -> None:
    x, w = drawn(2, 16, 8, 8), torch.randn(16, 16, 3, 3, requires_grad=True)

    def both(x: Tensor, w: Tensor) -> Tensor:
        return conv_transpose2d(conv2d(x, w, None, 1, 1), w) * 2

    other = drawn(2, 16, 8, 8)
    traced = make_fx(both)(x, w)
    torch.testing.assert_close(traced(other, w), both(other, w), rtol=2e-2, atol=0.1)
    with FakeTensorMode():
        fake = torch.empty(16, 16, 3, 3, requires_grad=True)
    with pytest.raises(Exception, match=r"[Ff]ake"):
        torch.ops.fastokd.conv2d(x, fake, 1, 1)


def test_places_that_do_not_exist() -> None:
    """Of no rows there is no sum, and no kernel fits them; sizes that overflow are never added."""
    op = torch.ops.fastokd.conv_weight_grad
    empty = op(drawn(0, 16, 4, 4), drawn(0, 16, 4, 4), 3, 1, 1)
    assert torch.equal(empty, torch.zeros(16, 16, 3, 3))
    wide = 2**58 - 20
    vast = torch.empty_strided(
        (0, 16, 1, wide), (16 * wide, 1, 16 * wide, 16), dtype=torch.bfloat16
    )
    assert torch.equal(op(vast, vast, 3, 1, 1), torch.zeros(16, 16, 3, 3))
    with pytest.raises(RuntimeError):
        op(torch.empty(2, 16, 0, 0, dtype=torch.bfloat16), drawn(2, 16, 2, 2), 3, 1, 0)
    w = torch.randn(16, 16, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError):
        conv2d(
            torch.empty(2, 16, 0, 8, dtype=torch.bfloat16).contiguous(memory_format=LAST),
            w,
            None,
            1,
            1,
        )
    with pytest.raises(RuntimeError, match="weights"):
        torch.ops.fastokd.conv2d(drawn(2, 16, 4, 4), torch.randn(16, 16, 3, 1), 4, 0)


def test_a_gradient_holds_itself_alone_and_has_no_derivative() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grad = step(drawn(8, 16, 8, 8), torch.randn(16, 16, 3, 3), None, drawn(8, 16, 8, 8), (1, 1))
    finally:
        torch.set_num_threads(before)
    assert grad[2].untyped_storage().nbytes() == 4 * grad[2].numel()
    x, w = drawn(2, 16, 8, 8).requires_grad_(), torch.randn(16, 16, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(conv2d(x, w, None, 1, 1).sum(), x, create_graph=True)


def test_other_maps_have_torchs_gradient() -> None:
    """The operator's own, of maps that the public function leaves to torch."""
    for x in (drawn(2, 16, 8, 8).contiguous(), drawn(2, 16, 8, 8).float(), drawn(2, 24, 8, 8)):
        leaves = x.clone().requires_grad_(), torch.randn(16, x.shape[1], 3, 3, requires_grad=True)
        torch.ops.fastokd.conv2d(*leaves, 1, 1).square().sum().backward()
        ours = [leaf.grad for leaf in leaves]
        wide = [leaf.detach().to(x.dtype).double().requires_grad_() for leaf in leaves]
        F.conv2d(wide[0], wide[1], None, 1, 1).square().sum().backward()
        for found, right in zip(ours, wide, strict=True):
            assert found is not None
            assert right.grad is not None
            assert (found.double() - right.grad).norm() < 0.02 * right.grad.norm()


def test_a_bias_and_a_strided_gradient() -> None:
    x, w, b = drawn(2, 16, 8, 8), torch.randn(32, 16, 3, 3), torch.randn(32)
    y_grad = drawn(1, 32, 1, 1).expand(2, 32, 8, 8)
    _, _, w_grad, b_grad = step(x, w, b, y_grad, (1, 1))
    wide = [t.double() for t in (x, w.bfloat16(), b, y_grad)]
    _, _, w_exact, b_exact = step(*wide[:3], wide[3], (1, 1), impl="torch")
    torch.testing.assert_close(w_grad.double(), w_exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(b_grad.double(), b_exact, rtol=2e-2, atol=2e-2)


def test_what_is_left_to_torch() -> None:
    """Grouped, odd or ragged layers; other dtypes and layouts; no gradient; other CPUs."""
    for unsuited in (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, (1, 3)),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
    ):
        assert not suits(unsuited)
    x, w = drawn(2, 16, 4, 4), torch.randn(16, 16, 3, 3, requires_grad=True)

    def fast(x: Tensor, w: Tensor) -> bool:
        y = conv2d(x, w, None, 1, 1)
        return y.grad_fn is not None and "Conv2d" in y.grad_fn.name()

    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x, w)
        assert not fast(x.contiguous(), w)
        with torch.no_grad():
            assert not fast(x, w)
        assert not fast(x.clone().requires_grad_(), w.detach())
        cpp.set_capability("avx512")
        assert not fast(x, w)
    assert not fast(x.float(), w)


def test_a_cohorts_convolutions_use_it() -> None:
    cohort = Cohort(("resnet8", 2), 10)
    plain = Cohort(("resnet8", 2), 10, impl="torch")
    plain.load_state_dict(cohort.state_dict())
    images = torch.randn(8, 3, 32, 32)
    grads = []
    for one in (cohort, plain):
        for module in one.modules():
            if isinstance(module, NormAct):
                module.impl = "torch"
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
            loss = one(images.contiguous(memory_format=LAST)).logits_SBC.float().square().mean()
        calls = sum(event.name == "fastokd::conv2d" for event in profile.events())
        # All but the stem. The dispatcher meets each twice, for autograd and for the CPU.
        assert calls == (2 * (5 + 2 * 3) if one is cohort else 0)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_the_operator_refuses_what_it_cannot_take() -> None:
    op = torch.ops.fastokd.conv_weight_grad
    x, y = drawn(2, 16, 4, 4), drawn(2, 16, 4, 4)
    assert op(y, x, 3, 1, 1).shape == (16, 16, 3, 3)
    for bad in ((y.float(), x, 3, 1, 1), (y, x, 5, 1, 2), (y, x, 3, 2, 1), (y[:1], x, 3, 1, 1)):
        with pytest.raises(RuntimeError):
            op(*bad)
    torch.library.opcheck(op, (y, x, 3, 1, 1), test_utils=("test_schema", "test_faketensor"))
