"""A step never makes the host wait for the device, whatever the method, the sharing and the engine.

Two watches: over whole steps on the CPU, for operators that read values; and over steps on CUDA
tensors without memory, for copies between the host and the device, which the CPU can't show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.benchmark.loops import OurLoop
from fastokd.data import Augment, BatchStream, Split, stream_of
from fastokd.learner.optimizers import create_optimizer, step_unless
from fastokd.learner.step import training_step
from fastokd.methods.kdcl_targets import covariance_weights
from fastokd.run import block
from fastokd.run.options import RunOptions
from fastokd.run.session import BATCH
from tests.learner.every_method import ONCE, READERS, small
from tests.learner.fake_cuda import CUDA, Dispatched, fake_step
from tests.learner.test_cuda_dtypes import CudaDtypes

ENGINES = ("loop", "grouped", "vmap")
CASES = [
    *((method, sharing, {}) for method, sharing in ONCE),
    *(("kdcl", "network", {"target": target}) for target in ("naive", "linear", "general")),
]
# On CUDA each reads a value, or the number of values, on the host; `lift_fresh` is torch.tensor(),
# which copies from memory that isn't pinned.
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "lift_fresh"),
    *("nonzero", "masked_select", "masked_scatter", "repeat_interleave", "bincount", "histc"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive"),
    "_linalg_check_errors",
}


class NoWaits(TorchDispatchMode):
    """Fails at what would make the host wait; counts the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{func} makes the host wait for the device"
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
            assert not masks, f"{func} counts a mask's values"
        self.ops += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "sharing", "options"), CASES)
def test_a_step_reads_nothing_back(method: str, sharing: str, options: dict[str, Any]) -> None:
    one = small(method, sharing, method_options=options, ema=0.9)
    how = RunOptions(
        device="cpu", precision="bf16", engine="loop", impl="torch", clip_norm=1.0,
        accumulate=2,
    )  # fmt: skip
    session = OurLoop(one, how).session
    for _ in range(2):
        (images,) = next(session.batches(lambda: None))
        with NoWaits() as watch, CudaDtypes() as dtypes:
            training_step(session.learner, images, body=session.whole_step)
        session.step += 1
        assert dtypes.checked > 20
        assert watch.ops > 100


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", READERS)
def test_other_engines_read_nothing_back(method: str, engine: str) -> None:
    how = RunOptions(device="cpu", precision="bf16", engine=engine, impl="torch")
    loop = OurLoop(small(method, "network"), how)
    with NoWaits() as watch:
        training_step(loop.session.learner, loop.images_BHWC, loop.labels_B)
    assert watch.ops > 100


@pytest.mark.parametrize(
    ("method", "sharing", "options", "engine"),
    [
        *((*case, "loop") for case in CASES),
        *((method, "network", {}, e) for method in READERS for e in ENGINES[1:]),
    ],
)
def test_a_step_on_a_gpu_touches_no_tensor_of_the_host(
    method: str, sharing: str, options: dict[str, Any], engine: str
) -> None:
    """And its losses are Triton's: none refuses the tensors that the engine gives it."""
    seen = fake_step(method, sharing, engine, "triton", **options)
    assert seen.ops.keys().isdisjoint(WAITS)
    assert seen.on_the_host == set()
    losses = seen.ops["mixture_distillation"] + seen.ops["peer_attention_distillation"]
    assert losses >= 1
    assert (seen.ops["decoupled_distillation"] > 0) == (method == "dkd")
    assert (seen.ops["correlation_distillation"] > 0) == (method == "dist")
    if method == "ffsd":
        assert seen.ops["feature_pair"] == 4
        assert seen.ops["fusion_step"] == 2
        assert seen.ops["kthvalue"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_other_optimizers_and_rates_by_step_are_on_the_device(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "schedule": "cosine", "schedule_by": "step"}
    seen = fake_step("okddip", "branch", "loop", "triton", settings)
    assert seen.ops.keys().isdisjoint(WAITS)
    assert seen.on_the_host == set()
    default = fake_step("okddip", "branch", "loop", "triton")
    assert seen.ops["_foreach_copy_"] == default.ops["_foreach_copy_"] + 1  # the rates


class Copies(TorchDispatchMode):
    """Whether each copy from the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        if len({x.device for x in tensors}) > 1:
            assert name in ("_to_copy", "copy_")
            named = kwargs.get("non_blocking", False)
            assert named or (name == "copy_" and args[2:] == (True,)), f"{func} waits"
            self.sources.append(args[0] if name == "_to_copy" else args[1])
        return out


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was copied to pinned memory."""
    found: list[Tensor] = []

    def pin_memory(host: Tensor) -> Tensor:
        found.append(host.clone())
        return found[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    return found


def test_a_steps_draws_are_copied_without_waiting(pinned: list[Tensor]) -> None:
    session = OurLoop(small("okddip_random", "branch"), RunOptions(device="cpu")).session
    session.learner.device = CUDA
    with FakeTensorMode(), Copies() as copies:
        for _ in range(2):
            session.begin_step(6)
    assert len(copies.sources) == 2
    assert all(a is b for a, b in zip(copies.sources, pinned, strict=True))


def test_an_epochs_draws_are_copied_in_blocks_without_waiting(
    pinned: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of 120 images in blocks of two: one copy for the batches' rows and one for the
    method's draws, and no copy of images or labels, which are on the device."""
    monkeypatch.setattr(block, "STEPS", 2)
    session = OurLoop(small("okddip_random", "branch"), RunOptions(device="cpu")).session
    session.learner.device = CUDA
    with FakeTensorMode(), Copies() as copies:
        split = Split(
            torch.empty(600, 32, 32, 3, dtype=torch.uint8, device=CUDA),
            torch.empty(600, dtype=torch.long, device=CUDA),
        )
        stream = stream_of(split, 120, augment=Augment(), shuffle=True)
        assert isinstance(stream, BatchStream)
        session.stream, session.batch = stream, 0
        for (images,) in session.batches(lambda: None):
            assert images == 120
            stream.read(session.blocks[images].read()[BATCH])
            session.finish_step()
    shapes = [tuple(source.shape) for source in copies.sources]
    assert shapes == [
        *((2, 120, 2, 2), (2, 3, 120)),
        *((2, 120, 2, 2), (2, 3, 120)),
        *((1, 120, 2, 2), (1, 3, 120)),
    ]
    assert all(a is b for a, b in zip(copies.sources, pinned, strict=True))


def test_adam_is_marked_capturable_within_a_capture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises where it is captured and isn't, and warns where it is and isn't captured."""
    seen: list[bool] = []
    with FakeTensorMode(), Dispatched():
        parameter = torch.nn.Parameter(torch.empty(3, device=CUDA))
        group = {"params": [parameter], "lr": torch.empty((), device=CUDA)}
        adam = create_optimizer("adam", [group], small("ffsd", "network"))
        adam.register_step_pre_hook(lambda *_: seen.append(adam.param_groups[0]["capturable"]))
        for capturing in (False, True, False):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
            parameter.grad = torch.empty_like(parameter)
            step_unless(adam, torch.empty((), device=CUDA))
        count = adam.state[parameter]["step"]
    assert seen == [False, True, False]
    assert count.device == CUDA


def test_renewing_kdcls_weights_reads_nothing_back() -> None:
    covariance_SS = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    with NoWaits():
        weights_S = covariance_weights(covariance_SS)
    torch.testing.assert_close(weights_S.tolist(), [0.25, 0.75], rtol=1e-5, atol=0)


def test_the_checks_detect_violations() -> None:
    x = torch.ones(3)
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.index_put_((x > 0,), x[0]),
        lambda: torch.tensor(1.0),
        lambda: bool(x[0]),
        lambda: torch.linalg.solve(torch.eye(3), x),
    ):
        with pytest.raises(AssertionError, match=r"wait for|counts a mask"), NoWaits():
            waits()
    for copies in (
        lambda: torch.tensor(1.0, device=CUDA),
        lambda: torch.ones(3).to(CUDA),
        lambda: torch.ones(3, device=CUDA).copy_(torch.ones(3)),
    ):
        with FakeTensorMode(), Dispatched() as seen:
            copies()
        assert seen.on_the_host or not seen.ops.keys().isdisjoint(WAITS)
