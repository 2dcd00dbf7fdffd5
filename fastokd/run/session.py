"""A run in training: a learner, its data, and its position."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastokd.data import BatchStream, DatasetSplits, DiskStream, read_all
from fastokd.data.mixing import dominant
from fastokd.device import moved
from fastokd.errors import UserError
from fastokd.learner.learner import TAUGHT, Learner
from fastokd.learner.optimizers import set_rate, set_rates
from fastokd.learner.shared_state import gathered, mine, share_state
from fastokd.learner.state import State, below, load_state, state_of
from fastokd.learner.step import step
from fastokd.methods import INDEX, MethodLoss, ramp_weight
from fastokd.metrics import Meter
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.resolution import training_size
from fastokd.run.block import Block, Draws
from fastokd.run.identity import check_recipe
from fastokd.run.kept_statistics import kept_preprocessing
from fastokd.run.mixing import mixing_of
from fastokd.run.options import KEPT, RunOptions
from fastokd.seeds import keyed_generator
from fastokd.student.weights import Weights

# The learning rates, the row of a batch, the mixing and the operations on its images among the draws of
# a step; a method's draws have other names.
RATES, BATCH, MIXING, OPERATIONS = "/rates", "/batch", "/mixing", "/operations"


class Stream(Protocol):
    """The batches of an epoch, from any batch on."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Session:
    """A :class:`Learner` with data and a position (:func:`fastokd.run.build.build` makes one).

    Attributes:
        stream: the training batches of this rank.
        teachers: the weights of the run's teachers.
        taught_NC: their logits of the training set, where the recipe has them cached.
        contents: SHA-256 of the teacher's and the initial weights.
        settled: the engine is chosen, so ``engine="auto"`` needs no timing.
        notes: notes for the user on the start of the run, a sentence each.
        epoch, batch, step: the next step: its epoch, its batch in the epoch, and its number in the
            run. Skipped steps count.
        best: the best score so far.
        skipped: steps skipped under ``skip_nonfinite``.
        waited: seconds that this process has waited for batches of decoded images.
        mixing: how the batches are mixed, or None.
        meter: the training metrics of this epoch.
        blocks: the draws on the device, by the number of images, which a CUDA graph is captured for.
    """

    recipe: Recipe
    options: RunOptions
    data: DatasetSplits
    stream: Stream
    learner: Learner
    settled: bool
    teachers: tuple[Weights, ...] = ()
    contents: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    taught_NC: Tensor | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    skipped: int = 0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.mixing = mixing_of(self.recipe)
        self.meter = Meter(self.recipe.students, self.recipe.has_leader)
        self.blocks: dict[int, Block] = {}
        self._single: dict[int, Block] = {}
        # What the device's counter is at: images, epoch, batch, step; and the steps from there on that
        # the block has.
        self._next: tuple[int, ...] = ()
        self._left = 0

    @property
    def stopped(self) -> bool:
        """Whether ``max_steps`` are done."""
        return self.options.max_steps is not None and self.step >= self.options.max_steps

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.epoch >= self.recipe.epochs or self.stopped

    @property
    def steps_left(self) -> int:
        """Steps until the recipe's end or ``max_steps``."""
        left = (self.recipe.epochs - self.epoch) * len(self.stream) - self.batch
        if self.options.max_steps is not None:
            left = min(left, self.options.max_steps - self.step)
        return left

    def begin_epoch(self) -> None:
        """Sets what is frozen, the ramp and the learning rates of this epoch."""
        recipe, progress = self.recipe, self.learner.progress
        self.learner.freeze(recipe.frozen_at(self.epoch))
        progress.epoch.fill_(self.epoch)
        progress.ramp.fill_(ramp_weight(self.epoch + recipe.ramp_first, recipe.ramp_epochs))
        self._set_rates()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.learner.optimizers for group in o.param_groups]

    def _set_rates(self) -> None:
        """Sets the learning rates of the step at this position."""
        for group, rate in zip(self._groups, self._rates(self.batch), strict=True):
            set_rate(group, rate)

    def _rates(self, batch: int) -> list[float]:
        """The learning rate of each group of parameters in this epoch's step ``batch``."""
        recipe, rates = self.recipe, []
        for group in self._groups:
            rate = recipe.learning_rate(
                self.epoch, warm_up=group["warm_up"], step=batch, steps=len(self.stream)
            )
            factor = rate / recipe.lr if group["scheduled"] else 1.0
            rates.append(group["initial_lr"] * factor)
        return rates

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step that was taken, before and after :meth:`finish_epoch`."""
        return max(self.epoch - (self.batch == 0), 0)

    @property
    def last_rate(self) -> float:
        """The recipe's learning rate in the last step of this epoch that was taken."""
        last = max(self.batch - 1, 0)
        return self.recipe.learning_rate(self.epoch, step=last, steps=len(self.stream))

    def batches(self, at_end: Callable[[], None]) -> Iterator[tuple[Any, ...]]:
        """The rest of the epoch, as the arguments of :meth:`whole_step`; the draws of a step are on the
        device before it. If the position is moved, also by ``at_end``, the batches continue from there.
        """
        while self.batch < len(self.stream) and not self.stopped:
            for batch in self._from_here():
                index = self.batch
                self._upload(batch[0])
                yield batch
                if self.stopped or self.batch != index + 1:
                    break
            at_end()

    def _from_here(self) -> Iterator[tuple[Any, ...]]:
        """The number of images of each batch, and the batch unless the step makes it on the device."""
        if isinstance(self.stream, BatchStream):
            for index in range(self.batch, len(self.stream)):
                yield (self.stream.size(index),)
        else:
            stream = self.stream
            batches = stream.decoded if isinstance(stream, DiskStream) else stream.batches
            for images_BHWC, labels_B in self._waited(batches(self.epoch, self.batch)):
                yield len(labels_B), images_BHWC, labels_B

    def _waited(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``, with the time that the host waits for each in :attr:`waited`."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def _upload(self, images: int) -> None:
        """Uploads the draws of this step and those after it, unless the device's counter is at them."""
        here = (images, self.epoch, self.batch, self.step)
        if here != self._next or self._left == 0:
            if images not in self.blocks:
                self.blocks[images] = Block(self.learner.device)
            self._left = self.blocks[images].fill(self._ahead(images))
        self._left -= 1
        self._next = (images, self.epoch, self.batch + 1, self.step + 1)

    def _ahead(self, images: int) -> Iterator[Draws]:
        """The draws of this step and of the epoch's next ones of as many images."""
        made = self.stream if isinstance(self.stream, BatchStream | DiskStream) else None
        for ahead in range(min(len(self.stream) - self.batch, self.steps_left)):
            batch = self.batch + ahead
            if made is not None and made.size(batch) != images:
                return
            draws = self._draws(images, self.step + ahead) | self._images_of(batch)
            if isinstance(made, BatchStream):
                draws[BATCH] = made.row(self.epoch, batch)
            if self.mixing is not None:
                draws[MIXING] = self._mixed_as(images, batch)
            operations_BL = None if made is None else made.operations(self.epoch, batch)
            if operations_BL is not None:
                draws[OPERATIONS] = operations_BL
            if self.recipe.schedule_by == "step":
                draws[RATES] = torch.tensor(self._rates(batch))
            yield draws

    def _draws(self, images: int, number: int) -> Draws:
        """The method's random numbers of step ``number``, a function of (seed, step): drawn for the
        whole batch, then this rank's ``images`` of them."""
        line = self.learner.ranks.data
        generator = keyed_generator(self.recipe.seed, "draws", number)
        whole = self.learner.method.draw(images * line.size, generator)
        mine = slice(line.rank * images, (line.rank + 1) * images)
        return {name: value[mine] for name, value in whole.items()}

    def _images_of(self, batch: int) -> Draws:
        """The images' numbers in the training set, where the method reads them."""
        if not self.learner.method.needs.training_set:
            return {}
        assert isinstance(self.stream, BatchStream | DiskStream)
        return {INDEX: self.stream.order.samples(self.epoch, batch)}

    def _mixed_as(self, images: int, batch: int) -> Tensor:
        """The mixing of this rank's ``images`` in batch ``batch`` of this epoch (:meth:`Mixing.draw`)."""
        assert self.mixing is not None
        line = self.learner.ranks.data
        mine = slice(line.rank * images, (line.rank + 1) * images)
        # A batch that is repeated is the epoch's first one as the students see it.
        epoch, index = (0, 0) if self.options.overfit_batch else (self.epoch, batch)
        size = self.data.train.image_size
        if self.recipe.resized_crop:
            size = (training_size(self.recipe, epoch),) * 2
        return self.mixing.draw(epoch, index, images * line.size, mine, size)

    def mixed(
        self, images: Tensor, labels_B: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images as the students see them, and the label of the larger share of each. The loss
        finds both labels in ``progress.mixed_with``.

        ``draws``: this step's, on the device; None: drawn here, for a step outside of the loop.
        """
        if self.mixing is None:
            return images, labels_B
        if draws is None:
            draws = moved(self._mixed_as(len(labels_B), self.batch), labels_B.device)
        images, mixed_with = self.mixing(draws, images, labels_B)
        self.learner.progress.mixed_with = mixed_with
        return images, dominant(labels_B, mixed_with)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The batch of the next step; doesn't change the position."""
        return next(iter(self.stream.batches(self.epoch, self.batch)))

    def begin_step(self, images: int) -> None:
        """Draws the method's random numbers of this step alone, for a step outside of the loop; its
        images aren't mixed but by :meth:`mixed`.

        ``images``: this rank's number of images. Batches of one size share tensors, since a captured
        step always reads the same memory.
        """
        if images not in self._single:
            self._single[images] = Block(self.learner.device, steps=1)
        block = self._single[images]
        draws = self._draws(images, self.step) | self._images_of(self.batch)
        if self.taught_NC is not None and isinstance(self.stream, BatchStream):
            index_B = self.stream.row(self.epoch, self.batch)[0, :images]  # the first view's
            draws[TAUGHT] = self.taught_NC.cpu().index_select(0, index_B)
        block.fill(iter([draws]))
        progress = self.learner.progress
        progress.draws = {name: x[0] for name, x in block.tensors.items()}
        progress.mixed_with = None
        if self.recipe.schedule_by == "step":
            self._set_rates()

    def whole_step(
        self, learner: Learner, images: int, *batch: Tensor
    ) -> tuple[Tensor, MethodLoss]:
        """One step from its draws to its metrics: what the graph of a captured step contains.

        ``batch``: images and labels, where the stream doesn't make them of the draws.
        """
        images_BHWC, labels_B, counted_B = self.drawn(images, *batch)
        logits_SBC, loss = step(learner, images_BHWC, labels_B)
        self.count(logits_SBC, counted_B, loss)
        return logits_SBC, loss

    def drawn(self, images: int, *batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step's batch as the students see it, its labels, and the labels that its accuracy counts; the
        draws and the rates are set. The arguments are those of :meth:`whole_step`."""
        progress, draws = self.learner.progress, self.blocks[images].read()
        if RATES in draws:
            set_rates(self._groups, draws.pop(RATES))
        operations_BL = draws.pop(OPERATIONS, None)
        if isinstance(self.stream, BatchStream):
            row = draws.pop(BATCH)
            batch = self.stream.read(row, operations_BL)
            if self.taught_NC is not None:
                draws[TAUGHT] = self.taught_NC.index_select(0, row[0, :images])
        images_BHWC, labels_B = batch
        if isinstance(self.stream, DiskStream):
            images_BHWC = self.stream.finish(images_BHWC, operations_BL)
        mixing = draws.pop(MIXING, None)
        progress.draws = draws
        images_BHWC, counted_B = self.mixed(images_BHWC, labels_B, mixing)
        return images_BHWC, labels_B, counted_B

    def count(self, logits_SBC: Tensor, counted_B: Tensor, loss: MethodLoss) -> None:
        """Adds a step to the training metrics."""
        losses = {"loss": loss.total, **loss.parts}
        self.meter.update(logits_SBC, counted_B, losses, self.learner.guard.fault)

    def finish_step(self) -> None:
        """Counts one step."""
        self.batch += 1
        self.step += 1

    def finish_epoch(self) -> None:
        """Moves to the next epoch, unless this one was interrupted."""
        if self.batch < len(self.stream):
            return
        heldout = None if self.data.val is None else read_all(self.data.val)
        self.learner.method.end_epoch(self.learner.cohort, heldout)
        self.meter.set({})
        self.epoch, self.batch = self.epoch + 1, 0

    def how(self) -> dict[str, Any]:
        """The run's settings, for :meth:`RunOptions.as_begun`."""
        learner = self.learner
        how = {name: getattr(self.options, name) for name in KEPT}
        one = learner.ranks.size == 1
        device = str(learner.device) if one else learner.device.type  # each rank has its own
        how |= {"device": device, "precision": learner.precision, "ranks": learner.ranks.size}
        how |= {"rows": learner.ranks.data.size}
        how |= {"loader": self.data.loader, **self.contents}
        if self.settled:
            how |= dataclasses.asdict(learner.choice)
        return how

    def state(self) -> State:
        """The state for a resumed run. All ranks call this together; rank 0 gets all tensors."""
        share_state(self.learner)
        tensors, facts = state_of(self.learner)
        if self.batch:
            tensors |= {f"meter.{k}": v for k, v in self.meter.totals.items()}
        facts |= {
            "recipe": self.recipe.to_json(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best": self.best,
            "skipped": self.skipped,
            "class_names": list(self.data.class_names),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "how": self.how(),
        }
        return gathered(self.learner.ranks, tensors), facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restores :meth:`state`.

        Raises:
            UserError: the checkpoint has another recipe or other data (the message names the
                difference), or lacks what a run of its recipe writes.
        """
        try:
            check_recipe(self.recipe, facts["recipe"])
            shown = kept_preprocessing(self.data, facts)
            self.data = replace(self.data, preprocessing=shown)
            self.learner.cohort.set_statistics(shown.mean, shown.std)
            self._load(mine(self.learner.ranks, tensors, facts), facts)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint doesn't hold what its recipe requires: {why}"
            ) from error

    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        learner = self.learner
        load_state(learner, tensors, facts)
        meter = below(tensors, "meter.")
        self.meter.set({k: v.to(learner.device) for k, v in meter.items()})
        self.epoch, self.batch, self.step = (int(facts[k]) for k in ("epoch", "batch", "step"))
        learner.freeze(self.recipe.frozen_at(self.epoch))
        self.best = facts["best"]
        if "rng.cpu" not in tensors:
            learner.ranks.seed_global(self.recipe.seed, self.step)
        self.skipped = int(facts.get("skipped", 0))
