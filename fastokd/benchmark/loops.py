"""The two programs that are timed: ours, and the published loop of ``fastokd/reference/``.

Both take the same images, labels and ramp. Our step starts from uint8 images, as in a run. The
published loop gets normalised images, as its loader normalised them outside of the step.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd import reference
from fastokd.benchmark import synthetic
from fastokd.device import autocast, pick_precision, set_matmul_precision, use_device
from fastokd.errors import UserError
from fastokd.learner.step import step, training_step
from fastokd.models import create_model
from fastokd.recipe.augmentation import UNCROPPED
from fastokd.recipe.names import Recipe
from fastokd.recipe.names import recipe as named_recipe
from fastokd.run.build import build
from fastokd.run.options import TUNED, RunOptions
from fastokd.run.trial import warm_up_steps
from fastokd.run.tuning import tune

# The steps of CIFAR's recipes.
LONG_RUN = 300 * 391

LOOPS: dict[str, type[reference.ReferenceCohort]] = {
    "baseline": reference.ReferenceIndependent,
    "ind": reference.ReferenceIndependent,
    "dml": reference.ReferenceDML,
    "cl_ilr": reference.ReferenceCLILR,
    "one": reference.ReferenceONE,
    "okddip": reference.ReferenceOKDDip,
    "okddip_random": reference.ReferenceRandom,
    "okddip_entropy": reference.ReferenceEntropy,
    "okddip_mean": reference.ReferenceMean,
    "okddip_symmetric": reference.ReferenceSymmetric,
    "okddip_no_two_level": reference.ReferenceNoTwoLevel,
    "dist": reference.ReferenceDIST,
    "dkd": reference.ReferenceDKD,
    "kd": reference.ReferenceKD,
    "okddip_kd": reference.ReferenceOKDDipKD,
    "kdcl": reference.ReferenceKDCL,
    "mcl": reference.ReferenceMCL,
    "okdph": reference.ReferenceOKDPH,
    "pcl": reference.ReferencePCL,
}
# The attributes of a published loop for the options of a method; those in SAME have the same name.
SPELT: dict[str, dict[Any, dict[str, bool]]] = {
    "detach_targets": {True: {"detach": True}, False: {"detach": False}},
    "mix": {"logits": {}, "probs": {"mix_probs": True}, "pairwise": {"pairwise": True}},
}
SAME = (
    *("temperature", "target", "linear_steps", "decay", "equal_heads"),
    *("omega", "beta", "gamma", "fusion", "gap", "tau", "alpha", "lam", "logit_distill"),
)


class Loop(Protocol):
    """A timed loop: ``step`` trains one step, always on the same batch; ``warm_up`` trains those before
    the timed ones; ``facts`` says how."""

    device: torch.device
    precision: str

    def step(self) -> Tensor: ...

    def warm_up(self) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class OurLoop:
    """``fastokd train``'s own step on drawn data."""

    def __init__(self, of: Recipe, options: RunOptions) -> None:
        batch = synthetic.drawn_batch(of)
        data = synthetic.drawn_splits(of, batch)
        of = dataclasses.replace(of, **UNCROPPED)  # the loader crops and repeats, not the step
        with tempfile.TemporaryDirectory() as folder:
            teacher = synthetic.drawn_teacher(of, data, Path(folder))
            taught = () if teacher is None else (str(teacher),)
            options = dataclasses.replace(options, teacher=taught, quiet=True)
            session = self.session = build(of, options, data=data)
        self.device, self.precision = session.learner.device, session.learner.precision
        self.images_BHWC = synthetic.in_views(of, batch.images_NHWC).to(self.device)
        self.labels_B = batch.labels_N.to(self.device)
        session.epoch = int(of.ramp_epochs)  # the end of the ramp: full weights
        session.learner.train()
        session.begin_epoch()

    def step(self) -> Tensor:
        """Trains one step; returns the total loss, on the device."""
        self.session.begin_step(len(self.labels_B))
        _, loss = training_step(self.session.learner, self.images_BHWC, self.labels_B)
        self.session.step += 1
        return loss.total.detach()

    def warm_up(self) -> None:
        """The steps before the timed ones, as many as the choice needs."""
        for _ in range(warm_up_steps(self.session, self.session.learner.choice)):
            self.step()

    def choose(self) -> dict[str, Any]:
        """The choice of ``engine="auto"`` for a long run of this recipe, as options."""
        tune(self.session, LONG_RUN)
        return {name: getattr(self.session.learner.choice, name) for name in TUNED}

    def facts(self) -> dict[str, Any]:
        """The engine and the implementation of each op, recorded in one more step, which is eager: a
        replayed graph dispatches nothing."""
        learner = self.session.learner
        self.session.begin_step(len(self.labels_B))
        with _FusedOps() as seen:
            step(learner, self.images_BHWC, self.labels_B)
        self.session.step += 1
        fast = "triton" if self.device.type == "cuda" else "cpp"
        impls = dict.fromkeys(sorted(seen.names), fast)
        if not seen.names & {"mixture_distillation", "peer_attention_distillation"}:
            impls["mixture_distillation"] = "torch"
        impls.setdefault("fused_bn_act", "torch")
        choice = learner.choice
        return {"engine": choice.engine, "way": str(choice), "impls": impls}


class _FusedOps(TorchDispatchMode):
    """Records the operators of this package; a backward counts as its forward's op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastokd":
            self.names.add(func._schema.name.split("::")[1].removesuffix("_backward"))
        return func(*args, **(kwargs or {}))


class PublishedLoop:
    """The published loop over one batch: eager, float32, channels first; with
    ``precision="bf16"`` under autocast and channels-last."""

    def __init__(
        self, of: Recipe, model: nn.Module, x_BCHW: Tensor, labels_B: Tensor, precision: str
    ) -> None:
        """``x_BCHW``: normalised images, or ``[V, B, 3, H, W]``, on the device of ``model`` (:func:`published_networks`)."""
        self.of = of
        self.precision = precision
        self.device = x_BCHW.device
        self.labels_B = labels_B
        by_hand = precision == "bf16"
        layout = torch.channels_last if by_hand else torch.contiguous_format
        self.model = model.to(memory_format=layout) if by_hand else model
        self.x_BCHW = x_BCHW.contiguous(memory_format=layout) if x_BCHW.dim() == 4 else x_BCHW
        self.optimizers: list[torch.optim.Optimizer]
        if isinstance(self.model, reference.ReferenceFFSD):
            options = of.method_options.items()
            weights = {k.removeprefix("lambda_"): v for k, v in options if k.startswith("lambda_")}
            self.lambdas = reference.Lambdas(**weights)
            self.optimizers = reference.ffsd_optimizers(self.model, of.lr, of.weight_decay)
        else:
            assert isinstance(self.model, reference.ReferenceCohort)
            names = ("lr", "momentum", "nesterov", "weight_decay")
            settings = {name: getattr(of, name) for name in names}
            self.optimizers = self.model.optimizers(**settings)

    @staticmethod
    def drawn(of: Recipe, options: RunOptions) -> PublishedLoop:
        """The loop on drawn images, in float32 where the precision is ``"auto"``."""
        device = use_device(options.device)
        asked = "fp32" if options.precision == "auto" else options.precision
        precision = pick_precision(asked, device)
        set_matmul_precision(precision)
        torch.manual_seed(of.seed)
        batch = synthetic.drawn_batch(of)
        model = published_networks(of, synthetic.num_classes(of)).to(device)
        images = synthetic.in_views(of, batch.images_NHWC).movedim(-1, -3).float() / 255
        statistics = (synthetic.MEAN, synthetic.STD)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in statistics)
        x_BCHW = ((images - mean) / std).to(device)
        return PublishedLoop(of, model, x_BCHW, batch.labels_N.to(device), precision)

    def step(self) -> Tensor:
        """Trains one step; returns the total loss, or the first network's where each has its own."""
        losses = self.losses()
        for loss, optimizers in losses:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        if isinstance(self.model, reference.ReferenceCohort):
            self.model.after_step()
        return losses[0][0].detach()

    def warm_up(self) -> None:
        """The first step allocates what is kept between steps."""
        self.step()

    def losses(self) -> list[tuple[Tensor, list[torch.optim.Optimizer]]]:
        """The losses, each with the optimizers that step after its backward."""
        with autocast(self.device, self.precision):
            if isinstance(self.model, reference.ReferenceFFSD):
                temperature = self.of.method_options["temperature"]
                out = reference.ffsd_losses(
                    self.model, self.x_BCHW, self.labels_B, self.lambdas, temperature
                )
                each = [*out.students, out.leader, out.fusion, *out.decoders.values()]
                pairs = zip(each, self.optimizers, strict=True)
                return [(loss, [optimizer]) for loss, optimizer in pairs]
            assert isinstance(self.model, reference.ReferenceCohort)
            outputs = self.model.outputs(self.x_BCHW)
            return [(self.model.losses(outputs, self.labels_B, 1.0).total, self.optimizers)]

    def facts(self) -> dict[str, Any]:
        """The published loop has no engine and none of our ops."""
        return {"engine": "reference", "way": "the published loop", "impls": {}}


def published_networks(of: Recipe, classes: int) -> nn.Module:
    """The published loop's networks, with the recipe's options.

    Raises:
        UserError: an option that the published loop doesn't take.
    """
    own = of.companion != "none"  # a loop that reads views
    foreign = [*of.model_options, *(["views"] if of.views != "shared" and not own else [])]
    if of.method != "ffsd":
        known = [*SPELT, *SAME, *vars(LOOPS[of.method])]
        foreign += [option for option in of.method_options if option not in known]
    if foreign:
        raise UserError(
            f"{of.name} sets {foreign[0]}, which the published loop doesn't take: time another recipe "
            "against it"
        )
    if of.method == "ffsd":
        return reference.ReferenceFFSD(of.model, classes, of.students)
    # A mixed cohort has a name for each student.
    names: Any = of.model if "+" not in of.model else of.models
    loop = LOOPS[of.method](names, classes, of.students, of.sharing)
    for option, value in of.method_options.items():
        spelt = SPELT[option][value] if option in SPELT else {option: value}
        for attribute, setting in spelt.items():
            setattr(loop, attribute, setting)
    if isinstance(loop, (reference.ReferenceKD, reference.ReferenceOKDDipKD)):
        teacher = named_recipe(of.teacher)
        loop.set_teacher(create_model(teacher.model, classes, **teacher.model_options))
    if isinstance(loop, reference.ReferenceRandom):
        loop.belief_BPP = torch.rand(of.batch_size, loop.peers, loop.peers)
    return loop
