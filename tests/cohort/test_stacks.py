"""Students' tensors as slices of stacked ones: the bits of stacking by a copy, without the copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.benchmark.loops import OurLoop
from fastokd.cohort import Choice, Cohort
from fastokd.cohort.stacks import Stack
from fastokd.learner.state import snapshot
from fastokd.models.layers import NormAct
from fastokd.run.options import RunOptions
from tests.learner.every_method import small

ENGINES = pytest.mark.parametrize("engine", ["grouped", "vmap"])
IMAGES_BHWC = torch.randint(
    256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Ops(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def joined_of(cohort: Cohort) -> set[bool]:
    """Whether what the engine stacks lies in one memory."""
    return {stack._joined(stack.parts()) for stack in cohort._stacks}


def cohort_of(engine: str, sharing: str = "network", impl: str = "torch", S: int = 3) -> Cohort:
    cohort = Cohort(("resnet8", S), 10, sharing=sharing, engine=engine, impl=impl).train()
    cohort.set_memory_format(torch.channels_last)
    return cohort


def copying(cohort: Cohort) -> Cohort:
    """A copy that stacks by copies."""
    copied = copy.deepcopy(cohort)
    for stack in copied._stacks:
        stack._whole = None
    return copied


def trained(
    cohort: Cohort, dtype: torch.dtype = torch.float32, steps: int = 3, ops: Ops | None = None
) -> dict[str, Tensor]:
    """Everything after some steps, each on two parts of a batch, with momentum and clipped gradients."""
    optimizer = torch.optim.SGD(cohort.parameters(), lr=0.1, momentum=0.9)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    found: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        for images_BHWC in IMAGES_BHWC.tensor_split(2):
            with ops or nullcontext(), autocast:
                out = cohort(images_BHWC)
                loss = out.logits_SBC.square().sum() + sum(f.float().mean() for f in out.features)
            loss.backward()
        found |= {
            f"grad.{k}": p.grad.clone() for k, p in cohort.named_parameters() if p.grad is not None
        }
        nn.utils.clip_grad_norm_(cohort.parameters(), 0.5)
        optimizer.step()
    assert len(found) == len(list(cohort.parameters()))
    state = {key: value.clone() for key, value in cohort.state_dict().items()}
    return {**found, **state, "logits": out.logits_SBC.detach()}


@ENGINES
@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.channels_last),
        (torch.float32, torch.contiguous_format),
    ],
)
def test_bits_are_those_of_copies(
    engine: str, sharing: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    cohort = cohort_of(engine, sharing)
    cohort.set_memory_format(layout)
    assert joined_of(copy.deepcopy(cohort)) == {False}
    copied = copying(cohort)
    theirs = trained(copied, dtype)
    for key, value in trained(cohort, dtype).items():
        assert torch.equal(value, theirs[key]), key
    assert joined_of(cohort) == {True}


@ENGINES
def test_the_fused_norms_of_a_cpu_too(engine: str) -> None:
    cohort = cohort_of(engine, impl="auto")
    theirs = trained(copying(cohort))
    for key, value in trained(cohort).items():
        assert torch.equal(value, theirs[key]), key


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_copies_no_weight_and_no_statistic(engine: str, dtype: torch.dtype) -> None:
    cohort = cohort_of(engine)
    ours, theirs = Ops(), Ops()
    trained(copying(cohort), dtype, 1, theirs)
    trained(cohort, dtype, 1, ours)
    narrow = dtype == torch.bfloat16
    # Two forwards. The logits are stacked, and where the weights are cast, that is one copy.
    assert ours.ops["cat"] == 0
    assert ours.ops["stack"] == 2
    assert ours.ops["_foreach_copy_"] == 2 * narrow
    layers, norms = 10, 9  # of a ResNet-8: its convolutions, two shortcuts and the linear layer
    assert theirs.ops["cat"] >= 2 * (layers + 4 * norms)
    assert theirs.ops["_foreach_copy_"] >= 2 * 2 * norms


@ENGINES
def test_gradients_are_slices_of_the_stacked_ones(engine: str) -> None:
    cohort, ops = cohort_of(engine), Ops()
    total = cohort(IMAGES_BHWC).logits_SBC.square().sum()
    with ops:
        total.backward()
    # The linear layer's is computed transposed, and copied into its layout for all at once.
    assert ops.ops["copy_"] == 1
    for key, first in cohort.students[0].named_parameters():
        other = cohort.students[1].get_parameter(key)
        assert first.grad is not None
        assert other.grad is not None
        assert first.grad.stride() == first.stride()
        assert other.grad.data_ptr() - first.grad.data_ptr() == first.nbytes, key


@ENGINES
def test_each_tensor_has_a_storage_of_its_own(engine: str, tmp_path: Path) -> None:
    """So one student is saved, copied and pickled without the others."""
    cohort = cohort_of("loop")
    cohort.set_memory_format(torch.contiguous_format)  # safetensors takes no other
    before = {key: (id(x), x.clone(), x.stride()) for key, x in cohort.named_parameters()}
    before |= {key: (id(x), x.clone(), x.stride()) for key, x in cohort.named_buffers()}
    cohort.set_engine(engine)
    assert joined_of(cohort) == {True}
    for key, x in (*cohort.named_parameters(), *cohort.named_buffers()):
        identity, value, stride = before[key]
        assert (id(x), x.stride()) == (identity, stride)
        assert torch.equal(x, value), key
        assert x.untyped_storage().nbytes() == x.nbytes
        assert x.storage_offset() == 0
    student = cohort.students[1]
    state = student.state_dict()
    size = sum(x.nbytes for x in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    assert size < len(file.getvalue()) < 1.3 * size
    save_file(cohort.state_dict(), tmp_path / "all.safetensors")
    kept = load_file(tmp_path / "all.safetensors")
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        for key, x in other.state_dict().items():
            assert torch.equal(x, state[key])
            assert torch.equal(x, kept[f"students.1.{key}"])
            assert x.data_ptr() != state[key].data_ptr()
            assert x.untyped_storage().nbytes() == x.nbytes
    copied = cohort.student(1)
    before_step = {key: x.clone() for key, x in copied.state_dict().items()}
    trained(cohort, steps=1)
    torch.testing.assert_close(copied.state_dict(), before_step, rtol=0, atol=0)


def one_cast(cohort: Cohort) -> None:
    """Another memory for a student that then gets its dtype back."""
    cohort.students[1].double().float()


def assigned(cohort: Cohort) -> None:
    """Other objects."""
    state = {key: x.clone() for key, x in cohort.state_dict().items()}
    cohort.load_state_dict(state, assign=True)


def one_replaced(cohort: Cohort) -> None:
    conv = cohort.students[0].get_submodule("conv1")
    conv.weight = nn.Parameter(conv.weight.detach().clone())


def in_another_order(cohort: Cohort) -> None:
    """Slices of the right memory, of the wrong students."""
    for key in ("conv1.weight", "bn1.running_mean"):
        first, second = (s.state_dict()[key] for s in cohort.students[:2])
        a, b = (dict((*s.named_parameters(), *s.named_buffers()))[key] for s in cohort.students[:2])
        a.data, b.data = second, first


@ENGINES
@pytest.mark.parametrize("move", [one_cast, assigned, one_replaced, in_another_order])
def test_tensors_that_were_moved_are_copied(engine: str, move: Callable[[Cohort], None]) -> None:
    cohort = cohort_of(engine)
    move(cohort)
    assert False in joined_of(cohort)
    theirs = trained(copying(cohort))
    for key, value in trained(cohort).items():
        assert torch.equal(value, theirs[key]), key
    cohort.set_engine(engine)
    assert joined_of(cohort) == {True}


@ENGINES
def test_a_cohort_that_is_moved_as_a_whole_is_joined_again(engine: str) -> None:
    cohort = cohort_of(engine)
    for move in (
        Cohort.double,
        Cohort.float,
        lambda c: c.set_memory_format(torch.contiguous_format),
    ):
        move(cohort)
        assert joined_of(cohort) == {True}
    with torch.device("meta"):
        assert Cohort(("resnet8", 2), 10, engine=engine).scale_C.is_meta


@ENGINES
def test_loading_writes_into_the_stacks(engine: str) -> None:
    cohort, other = cohort_of(engine), cohort_of("loop")
    with torch.no_grad():
        for x in other.parameters():
            x.normal_()
    cohort.load_state_dict(other.state_dict())
    assert joined_of(cohort) == {True}
    torch.testing.assert_close(cohort(IMAGES_BHWC).logits_SBC, other(IMAGES_BHWC).logits_SBC)


def test_tied_and_frozen_weights() -> None:
    """A weight that two layers share isn't joined twice in the same place, but read right."""
    found = []
    for engine in ("loop", "grouped"):
        cohort = Cohort(("resnet8", 2), 10, sharing="network").double()
        for student in cohort.students:
            last = student.get_submodule("layer3.0")
            last.get_submodule("bn2").weight = last.get_submodule("bn1").weight  # type: ignore[assignment]
            last.get_submodule("conv2").weight.requires_grad_(False)  # type: ignore[union-attr,operator]
        cohort.set_engine(engine)
        cohort.train()(IMAGES_BHWC).logits_SBC.square().sum().backward()
        found.append([x.grad for x in cohort.parameters()])
        assert sum(x is None for x in found[-1]) == 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_used_twice_counts_twice(momentum: float | None) -> None:
    """And one in eval mode doesn't."""
    states = []
    for engine in ("loop", "grouped"):
        cohort = Cohort(("resnet8", 2), 10, sharing="network").double().train()
        for student in cohort.students:
            for norm in student.modules():
                if isinstance(norm, NormAct):
                    norm.momentum = momentum
            last = student.get_submodule("layer3.0")
            last.bn2 = last.bn1
            student.get_submodule("bn1").eval()
        cohort.set_engine(engine)
        for _ in range(2):
            cohort(IMAGES_BHWC)
        states.append(cohort.state_dict())
    assert states[0]["students.1.layer3.0.bn1.num_batches_tracked"] == 4
    assert states[0]["students.1.bn1.num_batches_tracked"] == 0
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


@ENGINES
def test_a_run_restores_resumes_and_changes_its_engine(engine: str) -> None:
    """With parts of a batch, clipping, an average; bit for bit."""
    options = RunOptions(device="cpu", precision="fp32", engine=engine, accumulate=2, clip_norm=1.0)
    loop, resumed, copies = (
        OurLoop(small("okddip", "network", ema=0.9), options) for _ in range(3)
    )
    learner = loop.session.learner
    copied = copies.session.learner.cohort
    for x in copied.parameters():
        x.data = x.data.clone()
    loop.step()
    copies.step()
    assert (joined_of(learner.cohort), False in joined_of(copied)) == ({True}, True)
    tensors, facts = loop.session.state()
    tensors = {key: x.clone() for key, x in tensors.items()}
    restore = snapshot(learner)
    for choice in (Choice("loop"), Choice("vmap", memory_format="contiguous"), Choice(engine)):
        learner.adopt(choice)
        loop.step()
    restore()
    resumed.session.load_state(tensors, facts)
    assert joined_of(learner.cohort) == joined_of(resumed.session.learner.cohort) == {True}
    loop.session.step = resumed.session.step
    states = []
    for one in (loop, resumed, copies):
        one.step()
        states.append(
            {k: x for k, x in one.session.state()[0].items() if not k.startswith("meter")}
        )
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert torch.equal(value, states[2][key]), key


def test_layouts_that_differ_are_not_joined() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)]
    stack = Stack(layers, "weight")
    stack.join()
    assert not stack._joined(stack.parts())
    assert torch.equal(stack(), torch.stack([layer.weight for layer in layers]))


@ENGINES
def test_a_write_between_forward_and_backward_is_refused(engine: str) -> None:
    """As with the loop: the gradients would be those of other weights."""
    cohort = cohort_of(engine)
    loss = cohort(IMAGES_BHWC).logits_SBC.square().sum()
    with torch.no_grad():
        next(iter(cohort.students[1].parameters())).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ENGINES
def test_one_tensor_of_several_students_stays_one(engine: str) -> None:
    cohort = cohort_of("loop", S=2)
    cohort.students[1].fc.bias = cohort.students[0].fc.bias  # type: ignore[union-attr]
    loop, stacked = copy.deepcopy(cohort), cohort
    stacked.set_engine(engine)
    found = trained(stacked, steps=2)
    for key, value in trained(loop, steps=2).items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@ENGINES
def test_a_copy_whose_original_is_gone_is_joined_again(engine: str) -> None:
    """Addresses of the original may be used again."""
    cohort = cohort_of(engine, S=1)
    copied = copy.deepcopy(cohort)
    assert all(stack._whole is None for stack in copied._stacks)
    del cohort
    copied.set_memory_format(torch.channels_last)
    assert joined_of(copied) == {True}
    with torch.no_grad():
        before = copied(IMAGES_BHWC).logits_SBC
        copied.students[0].fc.weight.zero_()  # type: ignore[union-attr]
        assert not torch.equal(copied(IMAGES_BHWC).logits_SBC, before)


@ENGINES
def test_students_joined_in_inference_mode_train(engine: str) -> None:
    cohort = cohort_of("loop")
    with torch.inference_mode():
        cohort.set_engine(engine)
    trained(cohort, steps=1)


class TwoBiases(nn.Module):
    """A layer of somebody else: both parameters have one gradient."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.zeros(features)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.one + self.two)


def test_gradients_of_two_parameters_are_two_tensors() -> None:
    """Under vmap the sum's backward gives both the same one, which clipping would scale twice."""
    cohort = cohort_of("loop")
    for student in cohort.students:
        student.fc = nn.Sequential(student.fc, TwoBiases(10))
    cohort.set_engine("vmap")
    cohort(IMAGES_BHWC).logits_SBC.square().sum().backward()
    last: Any = cohort.students[0].fc[1]  # type: ignore[index]
    assert torch.equal(last.one.grad, last.two.grad)
    assert last.one.grad.data_ptr() != last.two.grad.data_ptr()
