"""DKD and DIST in C++ against float64, on each instruction set that this CPU has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.methods.divergence import Divergence
from fastokd.ops import cpp
from tests.ops.target_cases import OPTIONS, Drawn, assert_within_budget, draw, losses, outcome

# Students, samples, classes, targets: parts of a vector, fewer classes than one, more samples than a sum's
# first level.
SHAPES = [
    (3, 5, 10, 1),
    (2, 4, 100, 2),
    (1, 40, 17, 1),
    (2, 3, 1000, 1),
    (2, 70, 33, 2),
    (1, 3, 2, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("cpp_ops")


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(capability: str, op: str, dtype: torch.dtype) -> None:
    for S, B, C, targets in SHAPES:
        if op == "correlation" and C == 2:
            continue  # rho is 1 or -1, and of its gradient only roundings are left
        drawn = draw(S, B, C, targets=targets, dtype=dtype)
        # In fp16 small gradients would round to 0.
        assert_within_budget(op, drawn, "cpp", incoming=256.0 if dtype == DTYPES[2] else -1.7)


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.usefixtures("capability")
def test_other_weights_and_temperatures(op: str) -> None:
    for options in ({"temperature": 1.0, "beta": 0.0}, {"temperature": 0.02}, {"beta": -1.0}):
        assert_within_budget(op, draw(2, 6, 21), "cpp", **options)
    assert_within_budget(op, draw(2, 6, 21, scale=40.0), "cpp")


@pytest.mark.parametrize("op", OPTIONS)
def test_dtypes_and_labels_may_differ(op: str) -> None:
    z_SBC, t_SBC, labels_B = draw(2, 5, 12)
    for dtype in (torch.int32, torch.uint8):
        drawn = Drawn(z_SBC.bfloat16(), t_SBC, labels_B.to(dtype))
        assert_within_budget(op, drawn, "cpp")


@pytest.mark.usefixtures("capability")
def test_a_target_that_is_constant_over_the_batch() -> None:
    """Its columns' rho is 0, whatever their means' rounding."""
    z_SBC, t_SBC, labels_B = draw(2, 13, 16)
    drawn = Drawn(z_SBC, t_SBC[:, :1].expand(1, 13, 16), labels_B)
    assert_within_budget("correlation", drawn, "cpp", temperature=1.0)


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.usefixtures("capability")
def test_strides(op: str) -> None:
    """Rows of a wider memory, every second sample, students and targets that share theirs."""
    plain = draw(2, 5, 12)
    wanted = outcome(op, plain, "cpp")
    wide = torch.full((2, 10, 20), math.nan)
    wide[:, ::2, 3:15] = plain.logits_SBC
    target = torch.full((1, 5, 16), math.nan)
    target[..., 1:13] = plain.target_SBC
    for t_SBC in (target[..., 1:13], plain.target_SBC.expand(2, -1, -1)):
        found = outcome(op, Drawn(wide[:, ::2, 3:15], t_SBC, plain.labels_B), "cpp")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    shared = Drawn(plain.logits_SBC[:1].expand(3, -1, -1), plain.target_SBC, plain.labels_B)
    assert_within_budget(op, shared, "cpp")


@pytest.mark.parametrize("op", OPTIONS)
def test_threads_change_nothing(op: str) -> None:
    drawn = draw(3, 50, 200)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(outcome(op, drawn, "cpp"))
    torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.usefixtures("capability")
def test_odd_logits_are_the_references(op: str, value: float) -> None:
    """One logit of the student, the target or both is odd, the label's or another."""
    for c in (0, 3):
        for odd in ((True, False), (False, True), (True, True)):
            if value == 1e30 and c == 0:
                continue  # the reference loses what tells the others apart
            z_SBC, t_SBC, _ = draw(1, 3, 7)
            for x_SBC, is_odd in zip((z_SBC, t_SBC), odd, strict=True):
                if is_odd:
                    x_SBC[:, 1, c] = value
            drawn = Drawn(z_SBC, t_SBC, torch.zeros(3, dtype=torch.long))
            ours, theirs = outcome(op, drawn, "cpp"), outcome(op, drawn, "torch")
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPTIONS)
def test_float64_is_torchs(op: str) -> None:
    for which in (0, 1):
        drawn = list(draw())
        drawn[which] = drawn[which].double()
        with pytest.raises(UserError, match="float64 is for impl='torch'"):
            losses(op, Drawn(*drawn), "cpp")
        assert losses(op, Drawn(*drawn), "auto").dtype == torch.float64


@pytest.mark.parametrize("op", OPTIONS)
def test_auto_takes_the_cpp(op: str) -> None:
    z_SBC, t_SBC, labels_B = draw()
    z_SBC.requires_grad_()
    for impl in ("auto", "cpp"):
        loss_S = losses(op, Drawn(z_SBC, t_SBC, labels_B), impl)
        assert type(loss_S.grad_fn).__name__ == "TargetLossBackward"
    apart = Drawn(torch.zeros(3, 5, 100)[..., ::10], t_SBC, labels_B)
    with pytest.raises(UserError, match="10 elements apart"):
        losses(op, apart, "cpp")
    losses(op, apart, "auto")
    with pytest.raises(UserError, match="can't run as impl='cpp': it runs on the CPU only"):
        losses(op, Drawn(*(x.to("meta") for x in (z_SBC, t_SBC, labels_B))), "cpp")


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_methods_take_the_cpp(name: str) -> None:
    z_SBC, t_SBC, labels_B = draw()
    z_SBC.requires_grad_()
    totals = []
    for impl, taken in (("auto", True), ("cpp", True), ("torch", False)):
        total, _ = Divergence(name, impl=impl).to_target(z_SBC, t_SBC, labels_B, 4.0, weight=0.5)
        assert reaches("TargetLossBackward", total.grad_fn) == taken
        totals.append((total, *torch.autograd.grad(total, z_SBC)))
    torch.testing.assert_close(totals[0], totals[2])


def reaches(name: str, node: Any) -> bool:
    """Whether a graph has a node of this name."""
    if node is None or type(node).__name__ == name:
        return node is not None
    return any(reaches(name, before) for before, _ in node.next_functions)


def test_fp16_gradients_under_a_scaled_loss() -> None:
    """A GradScaler's 65,536 comes in before the gradient is rounded to fp16."""
    drawn = draw(1, 64, 200, dtype=torch.float16, scale=8.0)
    exact = Drawn(drawn.logits_SBC.double(), drawn.target_SBC.double(), drawn.labels_B)
    _, ours = outcome("correlation", drawn, "cpp", incoming=65536.0)
    _, wanted = outcome("correlation", exact, "torch", incoming=65536.0)
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-3, atol=1e-5)
    assert (outcome("correlation", drawn, "cpp")[1] == 0).float().mean() > 0.3  # without it


def calls() -> dict[str, Callable[[bool], tuple[Any, ...]]]:
    z_SBC, t_SBC, labels_B = draw(2, 3, 5)
    return {
        "decoupled_distillation": lambda ask: (z_SBC, t_SBC, labels_B, 0.7, 8.0, 4.0, ask),
        "correlation_distillation": lambda ask: (z_SBC, t_SBC, 1.5, 0.5, 2.0, ask),
    }


@pytest.mark.parametrize("op", calls())
def test_opcheck(op: str) -> None:
    for ask in (True, False):
        torch.library.opcheck(getattr(torch.ops.fastokd, op).default, calls()[op](ask))


@pytest.mark.parametrize("op", OPTIONS)
def test_compiles_as_one_graph(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(z_SBC: Tensor, t_SBC: Tensor, labels_B: Tensor) -> Tensor:
        return 3 * losses(op, Drawn(z_SBC, t_SBC, labels_B), "cpp").sum()

    monkeypatch.setattr(cpp, "_library", None)  # the search for the library isn't traced
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend="aot_eager")
    z_SBC, t_SBC, labels_B = draw(2, 3, 5, dtype=torch.bfloat16)
    z_SBC.requires_grad_()
    for t in (t_SBC, -t_SBC):
        (wanted,) = torch.autograd.grad(step(z_SBC, t, labels_B), z_SBC)
        (found,) = torch.autograd.grad(compiled(z_SBC, t, labels_B), z_SBC)
        torch.testing.assert_close(found, wanted)
