"""A run's parts, built from a recipe, and their state as one flat set of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.data import (
    Augment,
    BatchStream,
    DatasetSplits,
    Split,
    list_datasets,
    load_dataset,
)
from fastokd.device import autocast, pick_device, pick_precision, set_matmul_precision
from fastokd.errors import UserError
from fastokd.methods import Method, OptimGroup, Progress, create_method, method_class, ramp_weight
from fastokd.metrics import Meter
from fastokd.ops import _cpp
from fastokd.ops._dispatch import choose
from fastokd.optimizers import create_optimizer, set_rate
from fastokd.recipes import Recipe
from fastokd.teacher import KEPT, Weights, build_teacher, find_teacher

EVAL_BATCH = 512


@dataclass(frozen=True)
class RunOptions:
    """Where and how a recipe runs; nothing here decides what is learnt but the precision.

    Attributes:
        out: the run folder; None for ``runs/`` and the recipe's name.
        data_root: where data sets lie. ``download`` fetches the ones that can be had.
        teacher: a run, a checkpoint or a ``student.safetensors``, for a method that needs one; None
            for the default folder of the recipe that trains it.
        resume: continue the run in ``out``.
        max_steps: stop after so many steps in all. ``overfit_batch``: train on one batch again and
            again, a check that a set-up can learn at all.
        optimizer: ``"sgd"``, or ``"apex-sgd"`` where NVIDIA apex is installed.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        quiet: no progress bar and no lines.
    """

    out: Path | None = None
    data_root: Path | None = None
    download: bool = False
    device: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    impl: str = "auto"
    teacher: Path | None = None
    resume: bool = False
    max_steps: int | None = None
    overfit_batch: bool = False
    optimizer: str = "sgd"
    eval_every: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


class Session:
    """Everything that trains: data, cohort, method, optimizers, progress.

    ``epoch`` and ``batch`` are where the next step is; ``step`` counts all steps taken.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: RunOptions,
        *,
        training: bool = True,
        data: DatasetSplits | None = None,
    ) -> None:
        """``training=False``: to be evaluated alone, which needs neither teacher nor held-out
        images. ``data`` stands in for the recipe's (a benchmark's drawn images)."""
        self.recipe = recipe
        self.options = options
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)
        set_matmul_precision(self.precision)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.best: float | None = None

        if data is None:
            data = load_splits(recipe, options, self.device)
        self.data = data.to(self.device)
        stream = BatchStream(
            self.data.train,
            recipe.batch_size,
            seed=recipe.seed,
            augment=Augment(recipe.crop_padding, recipe.crop_mode, recipe.flip),
            shuffle=True,
            drop_last=False,
        )
        self.stream = RepeatedBatch(stream) if options.overfit_batch else stream
        if self.device.type == "cpu" and options.impl in ("auto", "cpp"):
            _cpp.ensure_built()  # never inside a step; where it fails, `choose` says why
        # Every op is asked again with its arguments; here only so that no folder is made first.
        choose("the loss", options.impl, self.device, {"cpp": None, "triton": None})
        torch.manual_seed(recipe.seed)
        self.teacher: Weights | None = None
        if training and method_class(recipe.method).needs.teacher:
            kept = run_path(recipe, options) / KEPT if options.resume else None
            self.teacher = find_teacher(recipe, options.teacher, kept)
        self.cohort, self.method = build_cohort(recipe, self.data, options, self.teacher)
        if training and self.method.needs.heldout and self.data.val is None:
            raise UserError(
                f"{recipe.method} measures the students on held-out images, and {recipe.dataset} "
                "has none apart: hold some out, for example with --val 5000"
            )
        self.cohort.to(self.device).to(memory_format=torch.channels_last)
        self.method.to(self.device)
        self.optimizers = self._optimizers()
        self.progress = Progress.start(self.device, dtype=torch.float32)
        self.meter = Meter(recipe.students, recipe.has_leader)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for each kind that is asked for; rates are device tensors."""
        groups = [OptimGroup(list(self.cohort.parameters())), *self.method.optim_groups()]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            lr = self.recipe.lr if group.lr is None else group.lr
            decay = self.recipe.weight_decay if group.weight_decay is None else group.weight_decay
            by_kind.setdefault(group.optimizer, []).append(
                {
                    "params": group.parameters,
                    "lr": torch.tensor(lr, device=self.device),
                    "weight_decay": decay,
                    "initial_lr": lr,
                    "scheduled": group.scheduled,
                    "warm_up": group.warm_up,
                }
            )
        return [
            create_optimizer(self.options.optimizer if kind == "sgd" else kind, groups, self.recipe)
            for kind, groups in by_kind.items()
        ]

    def autocast(self) -> Any:
        """The context of the forward pass."""
        return autocast(self.device, self.precision)

    @property
    def stopped(self) -> bool:
        """Whether ``max_steps`` are taken."""
        return self.options.max_steps is not None and self.step >= self.options.max_steps

    def begin_epoch(self) -> None:
        """Fills what changes from epoch to epoch: ramp and learning rates."""
        recipe = self.recipe
        self.progress.epoch.fill_(self.epoch)
        self.progress.ramp.fill_(ramp_weight(self.epoch + recipe.ramp_first, recipe.ramp_epochs))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rate = recipe.learning_rate(self.epoch, warm_up=group["warm_up"])
                factor = rate / recipe.lr if group["scheduled"] else 1.0
                set_rate(group, group["initial_lr"] * factor)

    def begin_step(self, batch: int) -> None:
        """The method's random draws of this step, a function of (seed, step)."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        draws = self.method.draw(batch, generator)
        self.progress.draws = {name: value.to(self.device) for name, value in draws.items()}

    def finish_epoch(self) -> None:
        """Moves on to the next epoch; an epoch that was cut short is left to be continued."""
        if self.batch < len(self.stream):
            return
        self.method.end_epoch(self.cohort, self._heldout())
        self.meter = Meter(self.recipe.students, self.recipe.has_leader)
        self.epoch, self.batch = self.epoch + 1, 0

    def _heldout(self) -> tuple[Tensor, Tensor] | None:
        val = self.data.val
        return None if val is None else (val.images_NHWC, val.labels_N)

    @property
    def kept_student(self) -> int:
        """The student that is taken away, as the recipe says."""
        return self.recipe.kept_student

    def _named_parameters(self) -> dict[Tensor, str]:
        return {
            parameter: f"{where}.{name}"
            for where, module in (("cohort", self.cohort), ("method", self.method))
            for name, parameter in module.named_parameters()
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs: tensors by name, and plain facts.

        Optimizer state is kept under its parameter's name, so that it fits any engine.
        """
        tensors = {f"cohort.{k}": v for k, v in self.cohort.state_dict().items()}
        tensors |= {f"method.{k}": v for k, v in self.method.state_dict().items()}
        names = self._named_parameters()
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"optim.{names[parameter]}:{key}"] = value
        tensors |= {f"meter.{k}": v for k, v in self.meter.totals.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "recipe": self.recipe.to_json(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best": self.best,
            "class_names": list(self.data.class_names),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
        }
        return tensors, facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of :meth:`state`.

        Raises:
            UserError: the checkpoint is of another recipe or of other data, and what differs; or
                it holds what no run of its recipe writes.
        """
        try:
            self._check_same(facts)
            self._take(tensors, facts)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint doesn't hold what its recipe asks for: {why}"
            ) from error

    def _check_same(self, facts: dict[str, Any]) -> None:
        """Refuses a checkpoint of another recipe, or of data with other classes or statistics."""
        theirs, ours = facts["recipe"], self.recipe.to_json()
        differing = [
            f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in ours if theirs.get(k) != ours[k]
        ]
        if differing:
            raise UserError(
                f"the checkpoint is of another recipe: it differs in {', '.join(differing)}; "
                "resume with the run's own recipe, or choose another --out"
            )
        for name in ("class_names", "mean", "std"):
            if facts[name] != list(getattr(self.data, name)):
                raise UserError(
                    f"the checkpoint was trained on other data: its {name} differ from those of "
                    f"the {self.recipe.dataset} here; give the --data-root that it was trained on"
                )

    def _take(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for prefix, module in (("cohort.", self.cohort), ("method.", self.method)):
            module.load_state_dict(_below(tensors, prefix))
        optim = _below(tensors, "optim.")
        by_name = {name: parameter for parameter, name in self._named_parameters().items()}
        for optimizer in self.optimizers:
            mine = {p for group in optimizer.param_groups for p in group["params"]}
            for key, value in optim.items():
                name, _, entry = key.rpartition(":")
                parameter = by_name[name]
                if parameter in mine:
                    optimizer.state[parameter][entry] = _as(value, parameter)
        meter = _below(tensors, "meter.")
        self.meter.totals = {k: v.to(self.device, copy=True) for k, v in meter.items()}
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.epoch, self.batch, self.step = (int(facts[k]) for k in ("epoch", "batch", "step"))
        self.best = facts["best"]


class RepeatedBatch:
    """The first batch of a stream, as often as the stream has batches (``--overfit-batch``)."""

    def __init__(self, stream: BatchStream) -> None:
        self.count = len(stream)
        self.only = stream.batch(0, 0)

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same images and labels, whatever the epoch."""
        del epoch
        for _ in range(start_batch, self.count):
            yield self.only


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """Where a run lies: ``out``, or ``runs/`` and the recipe's name."""
    return options.out or Path("runs") / f"{recipe.name.replace('/', '-')}-seed{recipe.seed}"


def load_splits(recipe: Recipe, options: RunOptions, device: torch.device) -> DatasetSplits:
    """The recipe's data on the device."""
    if recipe.dataset not in list_datasets():
        raise UserError(
            f"{recipe.name} can't be trained yet: nothing in this version loads {recipe.dataset}"
        )
    data = load_dataset(
        recipe.dataset,
        options.data_root,
        val=recipe.val,
        seed=0,
        download=options.download,
        image_size=recipe.image_size,
    )
    return data.to(device)


def build_cohort(
    recipe: Recipe, data: DatasetSplits, options: RunOptions, teacher: Weights | None = None
) -> tuple[Cohort, Method]:
    """The cohort and the method, on the CPU, with weights that the seed decides."""
    needs = method_class(recipe.method).needs
    frozen: nn.Module | None = None
    if teacher is not None:
        with torch.random.fork_rng(devices=[]):
            frozen = build_teacher(teacher, data)
    cohort = Cohort(
        recipe.models,
        len(data.class_names),
        sharing=recipe.sharing,
        engine=options.engine,
        # The norm has no Triton form: on a GPU the compiler fuses it.
        impl="auto" if options.impl == "triton" else options.impl,
        mean=data.mean,
        std=data.std,
        seed=recipe.seed,
        teacher=frozen,
        trunk_grad_scale=1 / recipe.students if needs.divide_trunk_gradient else 1.0,
        model_options=recipe.model_options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1_000_003 + 999_983)
        method = create_method(
            recipe.method, cohort.shape, impl=options.impl, **recipe.method_options
        )
    return cohort, method


def evaluation_stream(split: Split) -> BatchStream:
    """Every image once, in order, as it is."""
    batch = min(EVAL_BATCH, len(split))
    return BatchStream(split, batch, seed=0, augment=None, shuffle=False, drop_last=False)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _as(value: Tensor, like: Tensor) -> Tensor:
    """A copy on the device of ``like`` and in its memory layout; a count stays a count."""
    if value.dim() == 0:
        return value.to(like.device, copy=True)
    if value.shape != like.shape:
        raise ValueError(f"an optimizer's {list(value.shape)} for a parameter {list(like.shape)}")
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
