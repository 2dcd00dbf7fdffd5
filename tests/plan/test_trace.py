"""The counts on fake tensors equal those of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.benchmark.loops import OurLoop, PublishedLoop
from fastokd.benchmark.step import step_macs
from fastokd.learner.step import step
from fastokd.plan.ops import describe
from fastokd.plan.trace import trace_ours, trace_reference, use_torchs_layers
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions

TINY = "okddip-branch/resnet8/cifar100"


class Real(TorchDispatchMode):
    """Counts a step on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = describe(func, args, kwargs or {}, out, "", "")
        if op is not None:
            self.names.append(op.name)
            self.bytes += op.bytes
        return out


@pytest.mark.parametrize("name", [TINY, "ffsd/resnet8/cifar100"])
@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_our_step_is_counted_as_it_runs(name: str, engine: str, cpp_ops: None) -> None:
    of = recipe(name, batch_size=4)
    loop = OurLoop(of, RunOptions(engine=engine, precision="bf16"))
    session = loop.session
    session.begin_step(of.batch_size)
    use_torchs_layers(session.learner.cohort, session.learner.method, "auto")
    step(session.learner, loop.images_BHWC, loop.labels_B)  # makes the optimizers' states
    with Real() as real:
        step(session.learner, loop.images_BHWC, loop.labels_B)
    counted = trace_ours(of, 4, engine, "bf16", "auto")
    assert [op.name for op in counted.ops] == real.names
    assert counted.bytes == pytest.approx(real.bytes, rel=1e-3)


@pytest.mark.parametrize("name", [TINY, "ffsd/resnet8/cifar100", "dml/resnet8/cifar100"])
def test_the_published_step_is_counted_as_it_runs(name: str) -> None:
    of = recipe(name, batch_size=4)
    loop = PublishedLoop.drawn(of, RunOptions())
    with Real() as real:
        loop.step()
    step = trace_reference(of, 4)
    assert sorted(op.name for op in step.ops) == sorted(real.names)
    assert step.bytes == real.bytes


def test_the_yardstick_stays_plain_and_short() -> None:
    """A step of the published branch ResNet-32 has at most 1,600 operators."""
    step = trace_reference(recipe("okddip-branch/resnet32/cifar100"), 128)
    assert 1400 < len(step.ops) <= 1600
    assert {op.dtype for op in step.ops} <= {torch.float32, torch.int64, torch.bool}


def test_parameters_and_flops() -> None:
    of = recipe("okddip-branch/resnet32/cifar100", batch_size=8)
    step = trace_ours(of, 8, "loop", "bf16", "torch")
    assert step.parameters == 1554272  # facts/students.json
    assert step.gradient_bytes == 4 * step.parameters
    assert step.state_bytes == 4 * step.parameters
    # Three products a layer, without the gradient of the first convolution's input; attention adds a little.
    first = 3 * 16 * 9 * 32 * 32
    assert step.flops == pytest.approx(2 * 8 * (3 * step_macs(of) - first), rel=1e-3)


def test_each_engine_does_the_same_arithmetic() -> None:
    of = recipe(TINY, batch_size=4)
    flops = {trace_ours(of, 4, engine, "bf16", "torch").flops for engine in ("loop", "grouped")}
    assert len(flops) == 1


def test_memory_is_what_lives() -> None:
    """Twice the batch has twice the activations; the peak includes them and the kept memory."""
    of = recipe(TINY)
    one, two = (trace_ours(of, batch, "loop", "bf16", "torch") for batch in (64, 128))
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.02)
    kept = one.parameter_bytes + one.state_bytes
    assert kept + one.activation_bytes <= one.peak_bytes < kept + 2 * one.activation_bytes


def test_activations_are_what_autograd_saves() -> None:
    """Compared with the storages that autograd saves in a real step, without the parameters."""
    of = recipe(TINY, batch_size=16)
    loop = OurLoop(of, RunOptions(precision="fp32", impl="torch"))
    session = loop.session
    own = {p.untyped_storage().data_ptr() for p in session.learner.cohort.parameters()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = session.learner.cohort(loop.images_BHWC)
        loss = session.learner.method(out, loop.labels_B, session.learner.progress)
    assert loss.total.requires_grad
    counted = trace_ours(of, 16, "loop", "fp32", "torch").activation_bytes
    assert counted == pytest.approx(sum(saved.values()), rel=0.05)


def test_layers_of_the_backward_are_the_forwards() -> None:
    of = recipe(TINY, batch_size=4)
    step = trace_ours(of, 4, "loop", "bf16", "torch")
    for phase in ("forward", "backward"):
        products = [op for op in step.ops if op.kind == "product" and op.phase == phase]
        named = [op for op in products if op.layer]
        assert len(named) > 0.7 * len(products)
    assert any(op.layer == "trunk.layer2.0.conv1" and op.phase == "backward" for op in step.ops)


def test_transposed_products() -> None:
    """Each weight of a decoder is used once for every input pixel."""
    step = trace_ours(recipe("ffsd/resnet8/cifar100", batch_size=4), 4, "loop", "bf16", "torch")
    forward = [op for op in step.ops if op.name == "convolution"]
    pixels = 4 * 8 * 8
    # Decoders: from 64 channels to 32, and from 32 to 16 on four times the pixels.
    flops = [op.flops for op in forward]
    assert flops.count(2 * pixels * 64 * 32 * 9) >= 2
    assert flops.count(2 * 4 * pixels * 32 * 16 * 9) >= 2


def test_pools_are_counted_as_a_gpu_has_them(cpp_ops: None) -> None:
    """Ours is a launch each way and saves a byte a value; PyTorch's saves its input and eight."""
    of = recipe("baseline/resnet18/imagenet")
    found = {}
    for impl in ("auto", "torch"):
        step = trace_ours(of, 1, "loop", "bf16", impl)
        pools = [op for op in step.ops if "max_pool" in op.name]
        assert {op.kind for op in pools} == {"pool"}
        found[impl] = [(op.name, op.launches, op.bytes) for op in pools]
    x, y = 64 * 112 * 112, 64 * 56 * 56
    ours = 2 * x + 2 * y + y
    assert found["auto"] == [("max_pool", 1, ours), ("max_pool_backward", 1, ours)]
    name = "max_pool2d_with_indices"
    forward = (name, 1, 2 * x + 2 * y + 8 * y)
    assert found["torch"] == [forward, (f"{name}_backward", 2, forward[2] + 2 * x)]


def test_students_in_one_memory_are_counted_once() -> None:
    of = recipe("dml/resnet8/cifar100", batch_size=4)
    loop, grouped = (trace_ours(of, 4, engine, "bf16", "torch") for engine in ("loop", "grouped"))
    assert grouped.parameter_bytes == loop.parameter_bytes
    assert abs(grouped.activation_bytes - loop.activation_bytes) < 0.01 * loop.activation_bytes
