"""Everything that trains, and where it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.checkpoint import fingerprint, list_checkpoints
from fastokd.cohort import Choice
from fastokd.data import Augment, DatasetSplits
from fastokd.data.order import keyed_generator
from fastokd.device import (
    autocast,
    gradient_scaler,
    pick_precision,
    set_kernel_selection,
    set_matmul_precision,
    staged,
    use_device,
)
from fastokd.distributed.launch import device_here
from fastokd.distributed.ranks import Ranks, first, speaks
from fastokd.errors import UserError, warn
from fastokd.learner.allocator import keep_freed_memory
from fastokd.learner.ema import LeaderAverage
from fastokd.learner.guard import Guard
from fastokd.learner.optimizers import set_rate
from fastokd.learner.row import Row
from fastokd.learner.shared_state import gathered, mine, share_state
from fastokd.learner.state import as_state, load_state, state_of
from fastokd.learner.step import StepProgram
from fastokd.learner.sync_norm import synchronise
from fastokd.methods import Progress, method_class, ramp_weight
from fastokd.metrics import Meter
from fastokd.models import least_batch
from fastokd.ops import cpp
from fastokd.ops.dispatch import choose
from fastokd.recipe.names import Recipe
from fastokd.run.build import RepeatedBatch, build_cohort, build_optimizers, load_splits
from fastokd.run.options import KEPT, RunOptions
from fastokd.student.init import begin_from, read_files
from fastokd.student.teacher import KEPT as KEPT_TEACHER
from fastokd.student.teacher import Weights, check_held_out, find_teacher

__all__ = ["RunOptions", "Session", "run_path"]


class Session:
    """Everything that trains: data, cohort, method, optimizers, progress.

    ``epoch`` and ``batch`` are where the next step is; ``step`` counts all steps, those that were
    skipped included.
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
        self.device = use_device(device_here(options.device))
        self.ranks = Ranks.here(options.parallel, recipe.students, self.device)
        self.precision = pick_precision(options.precision, self.device)
        set_matmul_precision(self.precision)
        set_kernel_selection(self.device, options.deterministic)
        if training and self.device.type == "cpu":
            keep_freed_memory()
        self.epoch, self.batch, self.step = 0, 0, 0
        self.best: float | None = None

        if data is None:
            with self.ranks.one_a_machine_first():
                begun = options.resume or not training
                data = load_splits(recipe, options, self.device, begun=begun)
        self.data = data.to(self.device)
        # Images that a rank's norms need at once, the method's and the students'.
        self.min_batch = self._min_batch() if training else 1
        stream = self.data.train.stream(
            recipe.batch_size,
            seed=recipe.seed,
            augment=Augment(
                recipe.crop_padding, recipe.crop_mode, recipe.flip, recipe.resized_crop
            ),
            shuffle=True,
            drop_last=self._too_small_a_rest(),
            rank=self.ranks.data.rank,
            world_size=self.ranks.data.size,
        )
        self.stream = RepeatedBatch(stream) if options.overfit_batch else stream
        if self.device.type == "cpu" and options.impl in ("auto", "cpp"):
            cpp.ensure_built()  # never inside a step; where it fails, `choose` says why
        # Every op is asked again with its arguments; here only so that no folder is made first.
        choose("the loss", options.impl, self.device, {"cpp": None, "triton": None})
        torch.manual_seed(recipe.seed)
        self._check_fit()
        self.teacher: Weights | None = None
        if training and method_class(recipe.method).needs.teacher:
            kept = run_path(recipe, options) / KEPT_TEACHER if options.resume else None
            self.teacher = self.ranks.first(lambda: find_teacher(recipe, options.teacher, kept))
            if kept is None or self.teacher.path != kept:
                self._check_held_out(self.teacher)
        self.cohort, self.method = build_cohort(recipe, self.data, options, self.teacher)
        self.began_from: list[str] = []
        # Of the weights that the run takes from elsewhere.
        self.contents: dict[str, Any] = {}
        if self.teacher is not None:
            self.contents["teacher_sha256"] = fingerprint(self.teacher.state)
        if training and options.init and not _has_checkpoints(recipe, options):
            files = [Path(name) for name in options.init]
            names = self.data.class_names
            self.began_from = begin_from(self.cohort, files, names, recipe.kept_student)
            given = read_files(files)
            for weights in given:
                check_held_out(weights, self.data, "--init", recipe)
            self.contents["init_sha256"] = [fingerprint(weights.state) for weights in given]
        if training and self.method.needs.heldout and self.data.val is None:
            raise UserError(
                f"{recipe.method} measures the students on held-out images, and {recipe.dataset} "
                "has none apart: hold some out, for example with --val 5000"
            )
        self.cohort.to(self.device)
        self.method.to(self.device)
        if options.sync_bn:
            synchronise(self.cohort, self.method, self.ranks)
        # Where the students are shared by the ranks, this rank trains some.
        self.row = Row(self) if training and self.ranks.students.size > 1 else None
        self.optimizers = build_optimizers(self.cohort, self.method, recipe, options, self.device)
        self.progress = Progress.start(self.device, dtype=torch.float32)
        self.scaler = gradient_scaler(self.device, self.precision)
        self.guard = Guard(self.device)
        # Steps of this run that weren't taken, by leave of ``skip_nonfinite``.
        self.skipped = 0
        self.average: LeaderAverage | None = None
        if options.ema is not None:
            self.average = LeaderAverage(self.cohort, self.kept_student, options.ema)
        self.meter = Meter(recipe.students, recipe.has_leader)
        self._draws: dict[int, dict[str, Tensor]] = {}
        self.ranks.seed_global(recipe.seed, self.step)
        # An engine that timings choose may be another one next time: with other last bits.
        self.settled = (
            options.engine != "auto"
            or options.sync_bn
            or self.row is not None
            or options.deterministic
        )
        self.adopt(Choice.of(options.engine, options.compile, options.memory_format))

    def adopt(self, choice: Choice, *, alone: bool = False) -> None:
        """Runs the students as ``choice`` says from the next step on; state stays as it is.

        ``alone``: steps to be timed or tried on this rank, of which the others take no part.

        Raises:
            UserError: an engine that can't take these students, and why.
        """
        with self.autocast():  # an engine may refuse for its sake
            self.cohort.set_engine(choice.engine)
        self.cohort.set_memory_format(choice.torch_memory_format)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        # A fused optimizer walks through both as they lie in memory.
                        state[key] = as_state(value, parameter)
        self.choice = choice
        self.step_program = StepProgram(self, alone=alone)
        self.guard.share = None if alone or self.ranks.size == 1 else self.ranks.largest

    def _min_batch(self) -> int:
        """The fewest images that a rank, and each part of an accumulated batch, is given.

        Raises:
            UserError: a student can't take images of this size, or the batch is too small.
        """
        recipe, ranks = self.recipe, self.ranks.data.size
        least = {recipe.method: method_class(recipe.method).needs.min_batch}
        for name in dict.fromkeys(recipe.models):
            shown = (len(self.data.class_names), recipe.model_options, self.data.train.image_size)
            least[name] = least_batch(name, *shown)
        if self.options.sync_bn:  # which normalises over all ranks
            least = {name: -(-count // ranks) for name, count in least.items()}
        who = max(least, key=lambda name: least[name])
        if recipe.batch_size // ranks < least[who]:
            each = f", {recipe.batch_size // ranks} on each of {ranks} ranks" if ranks > 1 else ""
            raise UserError(
                f"batch_size is {recipe.batch_size}{each}, but {who} normalises over a batch of at "
                f"least {least[who]}: choose a larger --batch-size"
            )
        return least[who]

    def _too_small_a_rest(self) -> bool:
        """Whether an epoch's last batch is too small for the norms: it is left out."""
        rest = len(self.data.train) % self.recipe.batch_size
        return 0 < rest // self.ranks.data.size < self.min_batch

    def _check_fit(self) -> None:
        """Refuses options that this recipe has no use for."""
        options, recipe = self.options, self.recipe
        if options.accumulate > recipe.batch_size:
            raise UserError(
                f"accumulate is {options.accumulate}, but a batch has {recipe.batch_size} images: "
                "choose at most as many"
            )
        if options.teacher is not None and not method_class(recipe.method).needs.teacher:
            raise UserError(
                f"the teacher is {options.teacher}, but {recipe.method} has none: leave --teacher out"
            )

    def _check_held_out(self, teacher: Weights) -> None:
        """Refuses a teacher that has seen the images held out here."""
        if not check_held_out(teacher, self.data, "the teacher", self.recipe) and speaks():
            warn(
                f"the teacher {teacher.path} doesn't say what was held out of its training: it may "
                f"have seen the images of --val {self.data.held_out}"
            )

    def parts_of(self, batch: int) -> int:
        """In how many parts a batch is taken."""
        return max(1, min(self.options.accumulate, batch // self.min_batch))

    def autocast(self) -> Any:
        """The context of the forward pass."""
        return autocast(self.device, self.precision)

    @property
    def stopped(self) -> bool:
        """Whether ``max_steps`` are taken."""
        return self.options.max_steps is not None and self.step >= self.options.max_steps

    @property
    def steps_left(self) -> int:
        """Steps until the recipe's end, or until ``max_steps`` are taken."""
        left = (self.recipe.epochs - self.epoch) * len(self.stream) - self.batch
        if self.options.max_steps is not None:
            left = min(left, self.options.max_steps - self.step)
        return left

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
        """The method's random draws of this step, a function of (seed, step).

        ``batch``: images on this rank, whose part of the draws of the whole batch it takes. Batches
        of one size share their tensors, which a captured step reads again and again.
        """
        generator = keyed_generator(self.recipe.seed, "draws", self.step)
        line = self.ranks.data
        draws = self.method.draw(batch * line.size, generator)
        kept = self._draws.setdefault(batch, {})
        for name, whole in draws.items():
            value = staged(whole[line.rank * batch : (line.rank + 1) * batch], self.device)
            if name in kept:
                kept[name].copy_(value, non_blocking=True)
            else:
                kept[name] = value.to(self.device, copy=True, non_blocking=True)
        self.progress.draws = kept

    def finish_epoch(self) -> None:
        """Moves on to the next epoch; an epoch that was cut short is left to be continued."""
        if self.batch < len(self.stream):
            return
        self.method.end_epoch(self.cohort, self._heldout())
        self.meter = Meter(self.recipe.students, self.recipe.has_leader)
        self.epoch, self.batch = self.epoch + 1, 0

    def _heldout(self) -> tuple[Tensor, Tensor] | None:
        return None if self.data.val is None else self.data.val.read()

    @property
    def kept_student(self) -> int:
        """The student that is taken away, as the recipe says."""
        return self.recipe.kept_student

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, the method's own included."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def how(self) -> dict[str, Any]:
        """How the run runs, as :meth:`RunOptions.as_begun` takes it up again."""
        how = {name: getattr(self.options, name) for name in KEPT}
        one = self.ranks.size == 1
        device = str(self.device) if one else self.device.type  # each rank has its own
        how |= {"device": device, "precision": self.precision, "ranks": self.ranks.size}
        how |= {"loader": self.data.loader, **self.contents}
        if self.settled:
            how |= dataclasses.asdict(self.choice)
        return how

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs (``fastokd/learner/state.py``).

        Several ranks ask together, and the first has it all.
        """
        share_state(self)
        tensors, facts = state_of(self)
        return gathered(self, tensors), facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of :meth:`state`; raises as :func:`fastokd.learner.state.load_state`."""
        load_state(self, mine(self, tensors, facts), facts)


def run_path(recipe: Recipe, options: RunOptions) -> Path:
    """Where a run lies: ``out``, or ``runs/`` and the recipe's name."""
    return options.out or Path("runs") / f"{recipe.name.replace('/', '-')}-seed{recipe.seed}"


def _has_checkpoints(recipe: Recipe, options: RunOptions) -> bool:
    """Whether the run goes on from a state of its own, whatever it was begun from."""
    where = run_path(recipe, options) / "checkpoints"
    return options.resume and first(lambda: bool(list_checkpoints(where)))
