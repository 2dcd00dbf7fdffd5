"""One training step on fake tensors: every dispatched operator, and the memory in use.

Fake tensors have shapes and no values, so no data, no GPU and little memory are needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.benchmark.loops import PublishedLoop, published_networks
from fastokd.benchmark.synthetic import num_classes
from fastokd.cohort import Cohort
from fastokd.cohort.layers import OpConv2d, OpMaxPool2d
from fastokd.distributed.ranks import Ranks
from fastokd.errors import UserError
from fastokd.learner.build import build_cohort, build_optimizers
from fastokd.learner.learner import Learner
from fastokd.learner.step import step
from fastokd.methods import Method, method_class
from fastokd.methods.ffsd_modules import DecoderBlock
from fastokd.models import create_model
from fastokd.models.layers import NormAct
from fastokd.plan.ops import Op, describe
from fastokd.recipe.names import Recipe
from fastokd.recipe.names import recipe as named_recipe
from fastokd.reference import (
    ReferenceCohort,
    ReferenceKD,
    ReferenceOKDDipKD,
    ReferenceOKDPH,
    ReferencePCL,
    ReferenceRandom,
)

CHANNELS_LAST = torch.channels_last


@dataclass
class Step:
    """The operators and the memory of one step.

    Attributes:
        ops: in the order in which they ran.
        parameters: the number of trained parameters.
        parameter_bytes: weights and running statistics.
        gradient_bytes: gradients of the trained parameters.
        state_bytes: the optimizers' states.
        activation_bytes: saved by the forward for the backward.
        peak_bytes: the peak of all memory.
    """

    ops: list[Op] = field(default_factory=list)
    parameters: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0

    @property
    def flops(self) -> int:
        """Executed FLOPs of convolutions and linear layers."""
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        """Bytes that the operators read and write."""
        return sum(op.bytes for op in self.ops)


class _Record(TorchDispatchMode):
    """Records each operator, its layer, and the memory in use."""

    def __init__(self, names: dict[nn.Module, str], there: Sequence[Tensor] = ()) -> None:
        """``there``: tensors whose memory isn't the step's, so that views of them count nothing."""
        super().__init__()
        self.step = Step()
        self.names = names
        self.layers: list[str] = []
        self.layer_of_node: dict[int, str] = {}
        self.alive: dict[int, Any] = {x.untyped_storage()._cdata: None for x in there}
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        phase, layer = self._place()
        out = func(*args, **kwargs)
        op = describe(func, args, kwargs, out, phase, layer)
        if op is not None:
            self.step.ops.append(op)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._hold(x)
        return out

    def _hold(self, x: Tensor) -> None:
        """Counts a tensor's memory until it is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: Any) -> None:
            if self.alive.pop(key, None) is not None:
                self.live -= size

        self.alive[key] = weakref.ref(storage, freed)

    def _place(self) -> tuple[str, str]:
        """The phase, and the layer that runs; in the backward, the layer of the forward node with the
        same number. What runs outside of autograd's nodes after the first one belongs to the update."""
        node = torch._C._current_autograd_node()
        if node is not None:
            if not self.step.activation_bytes:
                self.step.activation_bytes = self.live
            return "backward", self.layer_of_node.get(node._sequence_nr(), "")
        if self.step.activation_bytes:
            return "optimizer", ""
        layer = self.layers[-1] if self.layers else ""
        self.layer_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, layer)
        return "forward", layer

    @contextmanager
    def named_layers(self) -> Iterator[None]:
        """Within the block, records which module runs."""

        def enter(module: nn.Module, _args: Any) -> None:
            above = self.layers[-1] if self.layers else ""
            self.layers.append(self.names.get(module, above or type(module).__name__))

        def leave(module: nn.Module, _args: Any, _out: Any) -> None:
            self.layers.pop()

        hooks = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def trace_ours(
    of: Recipe, batch: int, engine: str, precision: str, norm_impl: str, recomputes: bool = False
) -> Step:
    """Our step (``learner/step.py``) over ``batch`` images; norms and max pooling run by ``norm_impl``:
    ``"torch"``, or ``"auto"`` for the ops. ``recomputes``: with activation checkpointing.

    Raises:
        UserError: an engine that can't take the recipe's students.
    """
    classes = num_classes(of)
    teacher = None
    with torch.device("meta"):
        if method_class(of.method).needs.teacher:
            taught_by = named_recipe(of.teacher)
            teacher = create_model(taught_by.model, classes, **taught_by.model_options)
        cohort, method = build_cohort(of, classes, image_size=of.image_size, teacher=teacher)
        use_torchs_layers(cohort, method, norm_impl)
        if recomputes:
            cohort.recompute_activations()
        cohort.set_engine(engine)
    cpu = torch.device("cpu")
    with FakeTensorMode():
        modules = [cohort, method, *([cohort.teacher] if cohort.teacher is not None else [])]
        if method.needs.training_set:
            raise UserError(
                f"{of.method} keeps a memory of all training images, which a plan doesn't have: plan it "
                "with form='batch', whose students are the same"
            )
        for module in modules:
            _materialise(module, torch.contiguous_format if module is method else CHANNELS_LAST)
        cohort.join()
        size = of.image_size
        shape: tuple[int, ...] = (batch, size, size, 3)
        if of.number_of_views is not None:
            shape = (of.number_of_views, *shape)
        images_BHWC = torch.empty(shape, dtype=torch.uint8)
        labels_B = torch.zeros(batch, dtype=torch.long)
        optimizers = build_optimizers(cohort, method, of, cpu)
        # Autocast has no effect under vmap on fake tensors: that engine is traced in float32.
        precision = "bf16" if precision == "bf16" and engine != "vmap" else "fp32"
        learner = Learner(
            cohort, method, optimizers, device=cpu, precision=precision, ranks=Ranks()
        )
        # As `adopt`, which moves tensors: these can't be, and are in their layout already.
        learner.forward, learner.replicas = learner.eager, None
        learner.progress.draws = method.draw(batch, torch.Generator())
        _ = learner.before  # made in a run's first step, as the optimizers' states
        for parameter in learner.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        modules_there = [cohort, *([] if cohort.companion is None else [cohort.companion])]
        there = [x for one in modules_there for x in (*one.parameters(), *one.buffers())]
        record = _Record(_names(cohort, method), there)
        with record, record.named_layers():
            step(learner, images_BHWC, labels_B)
        return _finished(record, modules, optimizers)


def use_torchs_layers(cohort: Cohort, method: Method, norm_impl: str) -> None:
    """Makes convolutions run as torch's operators, as on a GPU. Norms and max pooling run by
    ``norm_impl``; the operators of the C++ are the Triton forms' too."""
    for module in (*cohort.modules(), *method.modules()):
        if isinstance(module, (OpConv2d, DecoderBlock)):
            module.impl = "torch"
        elif isinstance(module, (NormAct, OpMaxPool2d)):
            module.impl = norm_impl


def trace_reference(of: Recipe, batch: int, precision: str = "fp32", foreach: bool = False) -> Step:
    """The published loop's step; ``foreach``: with multi-tensor optimizers, torch's default on a GPU.

    Raises:
        UserError: KDCL's loop, and a recipe whose options the published loop doesn't take.
    """
    if of.method == "kdcl":
        raise UserError("the published KDCL reads values: its targets are searched one by one")
    classes = num_classes(of)
    with torch.device("meta"):
        model = published_networks(of, classes)
    with FakeTensorMode():
        modules = [model]
        if isinstance(model, (ReferenceKD, ReferenceOKDDipKD)):
            modules += model._teacher
        if isinstance(model, ReferenceOKDPH):
            modules += model._hybrid
        if isinstance(model, ReferencePCL):
            modules += model.mean
        for module in modules:
            _materialise(module, torch.contiguous_format)
        if isinstance(model, ReferenceRandom):
            model.belief_BPP = torch.rand(batch, model.peers, model.peers)
        views = () if of.number_of_views is None else (of.number_of_views,)
        x_BCHW = torch.empty(*views, batch, 3, of.image_size, of.image_size)
        loop = PublishedLoop(of, model, x_BCHW, torch.zeros(batch, dtype=torch.long), precision)
        for group in (group for one in loop.optimizers for group in one.param_groups):
            group["foreach"] = foreach
        record = _Record({module: name for name, module in model.named_modules()})
        with record, record.named_layers():
            for loss, optimizers in loop.losses():
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            if isinstance(model, ReferenceCohort):
                model.after_step()
        return _finished(record, modules, loop.optimizers)


def _finished(
    record: _Record, modules: list[nn.Module], optimizers: list[torch.optim.Optimizer]
) -> Step:
    """The recorded step, with the memory that stays."""
    step = record.step
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    step.parameters = sum(p.numel() for p in trained)
    step.parameter_bytes = sum(
        x.nbytes for module in modules for x in [*module.parameters(), *module.buffers()]
    )
    step.gradient_bytes = sum(p.nbytes for p in trained)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [x for state in states for x in state.values() if isinstance(x, Tensor)]
    step.state_bytes = sum(x.nbytes for x in tensors)
    # The published loop allocates optimizer states in this first step; later steps hold them.
    step.peak_bytes = record.peak + step.parameter_bytes + step.state_bytes
    return step


def _materialise(module: nn.Module, layout: torch.memory_format) -> None:
    """Replaces tensors on meta by fake tensors on the CPU."""
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in tables:
            for name, value in tensors.items():
                if value is None:
                    continue
                fake = torch.empty(value.shape, dtype=value.dtype)
                if value.dim() == 4:
                    fake = fake.contiguous(memory_format=layout)
                if isinstance(value, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                tensors[name] = fake


def _names(cohort: nn.Module, method: nn.Module) -> dict[nn.Module, str]:
    """Modules by name; an engine's stacked layers have the name of their first student's layer."""
    named = {module: f"method.{name}" for name, module in method.named_modules()}
    return {**named, **{module: name for name, module in cohort.named_modules()}}
