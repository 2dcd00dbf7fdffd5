"""Weights that are cast together: autocast's values, and nothing else sees the copies.

On a CPU with torch's layers they are cast as on a GPU (``tests/gpu/test_shadows.py``).
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.benchmark.loops import OurLoop
from fastokd.cohort import Cohort, shadows
from fastokd.models import Student
from fastokd.run.options import RunOptions
from tests.learner.every_method import small
from tests.learner.fake_cuda import fake_step


def by_autocast(sites: object) -> None:
    """In place of ``target``: autocast casts the weights."""


class Casts(TorchDispatchMode):
    """Counts what casts parameters, and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_foreach_copy_" or (name == "_to_copy" and args[0].dtype != out.dtype):
            self.ops[name] += 1
        return out


def two(engine: str, sharing: str) -> Cohort:
    """Two students whose layers cast as on a GPU; VGG has convolutions with biases."""
    name = "vgg16" if sharing == "network" and engine == "loop" else "resnet8"
    return Cohort((name, 2), 10, sharing=sharing, engine=engine, impl="torch")


def step(
    engine: str, sharing: str, dtype: torch.dtype = torch.float32, casts: Casts | None = None
) -> dict[str, Tensor]:
    """Outputs, gradients and state after one training step, in bf16 unless ``dtype`` is float64."""
    cohort = two(engine, sharing).to(dtype).train()
    cohort.set_memory_format(torch.channels_last)
    torch.manual_seed(1)
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    before = {key: id(x) for key, x in cohort.named_parameters()}
    with casts or nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            out = cohort(images)
            weights = torch.randn(out.logits_SBC.shape)
            loss = (out.logits_SBC * weights).sum() + sum(f.float().mean() for f in out.features)
        loss.backward()
    found = {"logits": out.logits_SBC.detach()}
    found |= {f"state.{key}": x for key, x in cohort.state_dict().items()}
    for key, x in cohort.named_parameters():
        assert isinstance(x, nn.Parameter)
        assert x.is_leaf
        assert x.grad is not None
        assert x.grad.dtype == x.dtype == dtype
        found[f"grad.{key}"] = x.grad
    assert {key: id(x) for key, x in cohort.named_parameters()} == before
    return found


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_values_and_gradients_are_autocasts(
    engine: str, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit."""
    theirs, ours = Casts(), Casts()
    found = step(engine, sharing, casts=ours)
    monkeypatch.setattr(shadows, "target", by_autocast)
    for key, value in step(engine, sharing, casts=theirs).items():
        assert torch.equal(value, found[key]), key
    # Instead of a cast a weight (grouped and vmap stack the students'), forward and backward: a copy a
    # student in the loop, else one for all; and the trunk's.
    cohort = two(engine, sharing)
    trunk = [] if cohort.trunk is None else shadows.sites_of(cohort.trunk)
    weights = len(shadows.sites_of(next(cohort._members()))) * (2 if engine == "loop" else 1)
    copies = (2 if engine == "loop" else 1) + (sharing == "branch")
    assert ours.ops["_foreach_copy_"] - theirs.ops["_foreach_copy_"] == 2 * copies
    assert theirs.ops["_to_copy"] - ours.ops["_to_copy"] == 2 * (weights + len(trunk))
    if engine != "vmap":  # on a CPU its norms are cast, too
        assert ours.ops["_to_copy"] <= 6


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_in_float64(engine: str, sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step(engine, sharing, torch.float64)
    monkeypatch.setattr(shadows, "target", lambda sites: torch.float64)
    for key, value in step(engine, sharing, torch.float64).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-9, atol=1e-9)


def test_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of three ResNet-8 on tensors without memory: 11 weights each."""
    ours = fake_step("dml", "network", "loop", "auto").ops
    monkeypatch.setattr(shadows, "target", by_autocast)
    theirs = fake_step("dml", "network", "loop", "auto").ops
    assert ours["_foreach_copy_"] - theirs["_foreach_copy_"] == 3
    assert theirs["_to_copy"] - ours["_to_copy"] == 3 * 11


def test_the_c_ops_get_float32_weights() -> None:
    """They cast themselves, and return gradients in float32."""
    casts = Casts()
    cohort = Cohort(("resnet8", 2), 10, sharing="network").train()
    with casts, torch.autocast("cpu", torch.bfloat16):
        cohort(torch.randn(4, 3, 32, 32))
    assert casts.ops["_foreach_copy_"] == 0


@pytest.mark.parametrize("method", ["okddip", "ffsd"])
def test_steps_are_the_same_and_resume(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, clipping and an average, four steps on end and two twice: bit for bit."""
    whole = steps(method, 4, None)
    parts = steps(method, 2, steps(method, 2, None))
    monkeypatch.setattr(shadows, "target", by_autocast)
    plain = steps(method, 4, None)
    for key, value in plain.items():
        if isinstance(value, Tensor):
            assert torch.equal(whole[key], value), key
            assert torch.equal(parts[key], value), key


def steps(method: str, count: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """The session's state after ``count`` steps from ``state``."""
    options = RunOptions(
        device="cpu",
        precision="bf16",
        engine="loop",
        impl="torch",
        accumulate=2,
        clip_norm=1.0,
    )
    loop = OurLoop(small(method, "network", ema=0.9), options)
    if state is not None:
        loop.session.load_state(state["tensors"], state["facts"])
    for _ in range(count):
        loop.step()
    tensors, facts = loop.session.state()
    tensors = {key: x.clone() for key, x in tensors.items()}
    return {**tensors, "tensors": tensors, "facts": facts}


class Tied(Student):
    """One convolution used twice, and one that doesn't learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight
        self.third = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.fc = nn.Linear(3, 2)
        self.chain(("first", "second"), ("third",), head="fc", feature_dim=3)


def test_tied_and_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Tied()
    sites = shadows.sites_of(student)
    found = []
    for shadowed in (True, False):
        if not shadowed:
            monkeypatch.setattr(shadows, "target", by_autocast)
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), shadows.narrowed(sites):
            if shadowed:
                assert student.first.weight is student.second.weight
                assert student.first.weight.dtype == torch.bfloat16
                assert not student.third.weight.requires_grad
            student(torch.ones(2, 3, 4, 4)).float().square().sum().backward()
        assert student.third.weight.grad is None
        assert student.first.weight is student.second.weight
        found.append([x.grad for x in student.parameters() if x.grad is not None])
    assert len(found[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_error_puts_the_parameters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "target", lambda sites: torch.bfloat16)
    student = Tied()
    own = [id(x) for x in student.parameters()]
    with pytest.raises(ZeroDivisionError), shadows.narrowed(shadows.sites_of(student)):
        raise ZeroDivisionError
    assert [id(x) for x in student.parameters()] == own


def test_an_unused_weight_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "target", lambda sites: torch.bfloat16)
    student = Tied()
    with shadows.narrowed(shadows.sites_of(student)):
        student.fc.weight.float().sum().backward()
    assert student.fc.weight.grad is not None
    assert student.first.weight.grad is None


class Renormed(nn.Module):
    """A user's container, whose code changes a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def test_weights_that_other_code_may_read_are_left_to_autocast() -> None:
    student = two("loop", "network").students[0]
    assert shadows.sites_of(student)
    student.add_module("own", Renormed())
    assert shadows.sites_of(student) == []


def test_a_functional_gradient_of_a_cohort_runs_under_autocast() -> None:
    cohort = two("loop", "network").eval()
    images_BHWC = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.func.functional_call(cohort, parameters, (images_BHWC,))
        return out.logits_SBC.float().square().mean()

    parameters = {key: x.detach() for key, x in cohort.named_parameters()}
    grads = torch.func.grad(loss)(parameters)
    assert all(x.dtype == torch.float32 for x in grads.values())
