"""A step on CUDA tensors that have no memory: what a GPU would be asked to do, on any machine.

Fake tensors have a device, a shape and a layout, and no values. The backward is left out: autograd's
engine asks for the streams of a device, which must be there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.benchmark.loops import OurLoop
from fastokd.data import BatchStream, Split
from fastokd.learner import step as step_module
from fastokd.learner.build import build_optimizers
from fastokd.learner.guard import Guard
from fastokd.learner.learner import Learner
from fastokd.methods import MethodLoss, Progress, create_method
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from tests.learner.every_method import small

CUDA = torch.device("cuda:0")


class Dispatched(TorchDispatchMode):
    """Counts the operators; ``on_the_host`` are those that touched a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.on_the_host: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        # They write in place, and have no form without values.
        out = None if name.startswith(("_amp_", "_fused_")) else func(*args, **kwargs)
        if name == "convolution" and any(x.stride(1) == 1 for x in args[:2]):
            # As cuDNN's: channels-last where the input or the weight is.
            out = torch.empty_like(out, memory_format=torch.channels_last)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(x.device.type != "cuda" for x in tensors):
            self.on_the_host.add(name)
        return out


def fake_step(
    method: str,
    sharing: str,
    engine: str,
    impl: str,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Dispatched:
    """What a bf16 step dispatches on a GPU, from its draws to the metrics, but for the backward.

    ``settings``: of the recipe; ``options``: of the method.
    """
    chosen = RunOptions(device="cpu", precision="bf16", engine=engine, clip_norm=1.0)
    recipe = small(method, sharing, method_options=options, **{"ema": 0.9, **(settings or {})})
    session = OurLoop(recipe, chosen).session
    session.options = dataclasses.replace(chosen, impl=impl)
    session.learner.method = create_method(
        recipe.method, session.learner.cohort.shape, impl=impl, **recipe.method_options
    )
    stream = session.stream
    assert isinstance(stream, BatchStream)
    capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
    pinning = mock.patch.object(Tensor, "pin_memory", lambda host: host)
    with FakeTensorMode(), fake_autocast(), capturing, pinning:
        _move(session)
        split = Split(_fake(stream.split.images_NHWC), _fake(stream.split.labels_N))
        session.stream = BatchStream(split, stream.order, stream.augment)
        (images,) = next(session.batches(lambda: None))
        learner = session.learner
        learner.before  # noqa: B018  # made before the step is counted
        with mock.patch.object(step_module, "gradients", without_backward), Dispatched() as seen:
            session.whole_step(learner, images)
    return seen


def without_backward(
    learner: Learner, images_BHWC: Tensor, labels_B: Tensor
) -> tuple[Tensor, MethodLoss]:
    """In place of ``gradients``: the forward, and gradients that nobody computed."""
    logits_SBC, extra_EBC, loss = learner.eager(images_BHWC, labels_B, learner.progress)
    learner.guard.check([logits_SBC, extra_EBC, loss.total, *loss.parts.values()])
    for parameter in learner.parameters():
        parameter.grad = torch.empty_like(parameter)
    return logits_SBC, loss


def _move(session: Session) -> None:
    """Puts the session on a GPU; its values are lost."""
    modules: list[nn.Module] = [session.learner.cohort, session.learner.method]
    if session.learner.cohort.teacher is not None:
        modules.append(session.learner.cohort.teacher)
    for module in (part for whole in modules for part in whole.modules()):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, value in table.items():
                if isinstance(value, nn.Parameter):
                    table[name] = nn.Parameter(_fake(value), requires_grad=value.requires_grad)
                elif value is not None:
                    table[name] = _fake(value)
    assert session.learner.average is not None
    session.learner.average.states = {
        index: {name: _fake(x) for name, x in state.items()}
        for index, state in session.learner.average.states.items()
    }
    session.learner.average.updates = _fake(session.learner.average.updates)
    session.learner.device = CUDA
    session.learner.autocast = fake_autocast  # type: ignore[method-assign]
    session.learner.guard = Guard(CUDA)
    session.learner.progress = Progress.start(CUDA, dtype=torch.float32)
    session.learner.optimizers = build_optimizers(
        session.learner.cohort, session.learner.method, session.recipe, CUDA
    )


def _fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


@contextmanager
def fake_autocast() -> Iterator[None]:
    """``torch.autocast("cuda", torch.bfloat16)``, which is off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
