"""The accuracy of the students, the leader and the ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.checkpoint import run_checkpoint
from fastokd.cohort import Cohort
from fastokd.data import BatchStream, DiskSplit, DiskStream, Split, load_dataset, stream_of
from fastokd.device import autocast, pick_precision, set_matmul_precision, use_device
from fastokd.distributed.ranks import Line, Ranks, speaks
from fastokd.errors import UserError, as_path, forget, in_one_line, warn
from fastokd.learner.average import Average
from fastokd.learner.captured import CapturedStep
from fastokd.learner.norms import BATCHES, recompute
from fastokd.learner.shared_state import share_state
from fastokd.methods import Method, create_method
from fastokd.metrics import Meter, label_rank
from fastokd.recipe.recipe import Recipe
from fastokd.run.build import build
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions, chosen
from fastokd.run.session import Session
from fastokd.student import authors

EVAL_BATCH = 512


def evaluation_stream(
    split: Split | DiskSplit, line: Line | None = None
) -> BatchStream | DiskStream:
    """Every image once, in order, without augmentation; the ranks of ``line`` share each batch."""
    line = line or Line()
    size = min(EVAL_BATCH * line.size, len(split))
    return stream_of(split, size, rank=line.rank, world_size=line.size)


class Scorer:
    """Scores a cohort on every image of a stream, in eval mode.

    ``test_flip``: the logits are the mean of those of the image and of its mirror image; what the method
    watches is the plain image's.

    ``captured``: the CUDA graphs of the training steps, or None. With them a batch's forward and metrics
    are a graph, too, captured when a size of a batch comes a second time. All graphs share one memory
    pool: they never run at the same time, and a batch leaves nothing but the totals.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: Method,
        has_leader: bool,
        context: Callable[[], AbstractContextManager[Any]],
        captured: CapturedStep | None = None,
        *,
        test_flip: bool = False,
    ) -> None:
        self.cohort, self.method, self.context, self.captured = cohort, method, context, captured
        self.test_flip = test_flip
        self.meter = Meter(len(cohort.students), has_leader)
        self._run: Callable[[Tensor, Tensor], Any] = self._count
        if captured is not None:
            device = cohort.scale_C.device
            graphs = CapturedStep(self._count, device, captured.record, warm_up=1)
            graphs.stream = captured.stream
            self._run = graphs

    @torch.no_grad()
    def measure(
        self,
        stream: BatchStream | DiskStream,
        between: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> dict[str, Any]:
        """The metrics over ``stream``, or over those of all ``ranks``; the mode is restored afterwards.

        ``between`` is called after each batch and may raise.
        """
        was_training = self.cohort.training, self.method.training
        self.cohort.eval()
        self.method.eval()
        self.meter.set({})
        try:
            for images_BHWC, labels_B in stream.batches(0):
                if len(labels_B) > 0:  # a rank may have no image of the last batch
                    self.add(images_BHWC, labels_B)
                between()
        finally:
            self.cohort.train(was_training[0])
            self.method.train(was_training[1])
        return self.meter.result(ranks)

    def add(self, images_BHWC: Tensor, labels_B: Tensor) -> None:
        """Counts a batch, in the present mode; nothing is read from the device."""
        try:
            self._run(images_BHWC, labels_B)
            return
        except (UserError, torch.OutOfMemoryError) as error:
            if self.captured is None or self._run == self._count:
                raise
            forget(error)
            why = in_one_line(error)
        # A failed capture has counted nothing. Its pool can't be captured into again, and the random
        # generator has left the state that the training graphs draw from.
        self._run = self._count
        self.captured.release()
        if speaks():
            warn(f"evaluations aren't captured as CUDA graphs: {why}")
        self._run(images_BHWC, labels_B)

    def _count(self, images_BHWC: Tensor, labels_B: Tensor) -> None:
        with self.context():
            out = self.cohort(images_BHWC)
            watched = dict(self.method.diagnostics(out))
            for name, logits_BC in self.method.classifiers(out).items():
                right_B = label_rank(logits_BC.float()[None], labels_B)[0] == 0
                watched[f"{name}_top1"] = right_B.double().mean()
            logits_SBC = self._flipped(images_BHWC, out.logits_SBC)
        self.meter.update(logits_SBC, labels_B, watched)

    @torch.no_grad()
    def logits(self, images_BHWC: Tensor) -> Tensor:
        """The logits ``[S, B, C]`` in float32 that the metrics are of, in the present mode."""
        with self.context():
            return self._flipped(images_BHWC, self.cohort(images_BHWC).logits_SBC).float()

    def _flipped(self, images_BHWC: Tensor, logits_SBC: Tensor) -> Tensor:
        """The mean of ``logits_SBC`` and those of the mirror images, if ``test_flip``."""
        if not self.test_flip:
            return logits_SBC
        mirrored_SBC = self.cohort(images_BHWC.flip(2)).logits_SBC
        return (logits_SBC.float() + mirrored_SBC.float()) / 2


def evaluate(
    run_or_checkpoint: str | Path | Run,
    *,
    dataset: str | None = None,
    model: str | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> dict[str, dict[str, Any]]:
    """Scores a run's newest checkpoint, or one checkpoint, on its data set.

    A file is read as a checkpoint of the papers' authors (:mod:`fastokd.student.authors`): it needs a
    ``dataset``, and a ``model`` if its keys don't determine it.

    Args:
        run_or_checkpoint: a :class:`fastokd.Run`, its folder, one of its checkpoints, or a file.
        options: where and how; single fields may be given as keywords (``device=``). A run knows
            where its data are, unless ``data_root`` says otherwise.

    Returns:
        ``{"val": {...}, "test": {...}}`` with the metrics of ``metrics.jsonl``; ``val`` only if
        the recipe holds images out.

    Raises:
        UserError: there is no such run or checkpoint, or its data can't be found.
    """
    path = as_path("run_or_checkpoint", run_or_checkpoint)
    options = chosen(options, changes)
    if path.is_file():
        return evaluate_published(path, dataset, model=model, options=options)
    for name, value in (("dataset", dataset), ("model", model)):
        if value is not None:
            raise UserError(f"{name} is {value!r}, but a run has its own: leave it out")
    path, tensors, facts = run_checkpoint(path)
    recipe = Recipe.from_json(facts.get("recipe"))
    run = path.parent.parent
    # The run's folder says where the data are, and which files are held out.
    options = replace(RunFacts(run).with_data(options), out=run)
    session = build(recipe, options, training=False)
    session.load_state(tensors, facts)
    return Evaluator(session)()


def evaluate_published(
    path: Path, dataset: str | None, *, model: str | None, options: RunOptions
) -> dict[str, dict[str, Any]]:
    """Scores the students of a checkpoint of the authors; raises as :func:`evaluate`."""
    if dataset is None:
        raise UserError(f"{path} doesn't say what it was trained on: add --dataset, as cifar100")
    published = authors.read(path, model=model)
    device = use_device(options.device)
    precision = pick_precision(options.precision, device)
    set_matmul_precision(precision)
    data = load_dataset(
        dataset,
        options.data_root,
        download=options.download,
        loader=options.loader,
        workers=options.workers,
        device=device,
    ).to(device)
    if len(data.class_names) != published.num_classes:
        raise UserError(
            f"{path} has {published.num_classes} classes, and {dataset} has "
            f"{len(data.class_names)}: choose another --dataset"
        )
    cohort = published.cohort(mean=data.mean, std=data.std).float()
    cohort.to(device).to(memory_format=torch.channels_last)
    method = create_method("baseline" if cohort.sharing == "network" else "ind", cohort.shape)
    context = partial(autocast, device, precision)
    scorer = Scorer(cohort, method, published.has_leader, context)
    return {
        name: scorer.measure(evaluation_stream(split))
        for name, split in (("val", data.val), ("test", data.test))
        if split is not None
    }


class Evaluator:
    """Scores a session's cohort, and its averaged students, on the held-out splits.

    What it makes is kept for the next call, until the learner adopts another choice.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._captured: CapturedStep | None = None
        self._whole: Scorer | None = None
        self._averaged: Scorer | None = None
        self._beside: Scorer | None = None

    def __call__(self, between: Callable[[], None] = lambda: None) -> dict[str, dict[str, Any]]:
        """The metrics by split; ``between`` as in :meth:`Scorer.measure`.

        Metrics of averages begin with ``ema_``: ``ema_top1`` and ``ema_top5`` are the kept student's;
        where every student has an average, the cohort's accuracies have that prefix, too. Those of a
        method's companion begin with ``companion_``.
        """
        results: dict[str, dict[str, Any]] = {}
        recipe = self.session.recipe
        for networks, scorer in self.scorers(between).items():
            for name, found in self._score(scorer, between).items():
                if networks == "students":
                    results[name] = found
                elif networks == "averages":
                    results[name] |= _of_averages(found, recipe.averaged.index(recipe.kept_student))
                else:
                    place = recipe.companion_of(recipe.kept_student) or 0
                    results[name] |= _of_averages(found, place, "companion")
                    results[name]["companion_student_top1"] = found["student_top1"]
        return results

    def scorers(self, between: Callable[[], None] = lambda: None) -> dict[str, Scorer]:
        """The scorers of the ``"students"`` and, where the run has them, of their ``"averages"`` and of the
        method's ``"companions"``, with the weights of now; ``between`` as in :meth:`Scorer.measure`."""
        learner = self.session.learner
        share_state(learner)
        if self._whole is None or self._captured is not learner.captured:
            self._captured, self._averaged, self._beside = learner.captured, None, None
            has_leader = self.session.recipe.has_leader
            self._whole = self._scorer(learner.cohort, learner.method, has_leader)
        found = {"students": self._whole}
        if learner.average is not None:
            found["averages"] = self._of_average(learner.average, between)
        if learner.cohort.companion is not None:
            networks = learner.cohort.companion.networks
            if self._beside is None:
                method = "ind" if len(networks.students) > 1 else "baseline"
                self._beside = self._scorer(networks, create_method(method, networks.shape), False)
            found["companions"] = self._beside
        return found

    def _of_average(self, average: Average, between: Callable[[], None]) -> Scorer:
        """The scorer of the averages. Statistics of norms that aren't averaged are recomputed, and stay in
        the average."""
        recipe = self.session.recipe
        if self._averaged is None:
            apart = self._averages_apart(average)
            method = create_method("ind" if len(average.states) > 1 else "baseline", apart.shape)
            has_leader = recipe.has_leader and len(average.states) > 1
            self._averaged = self._scorer(apart, method, has_leader)
        cohort, states = self._averaged.cohort, list(average.states.values())
        _copy_into(cohort, states)
        if not average.how.statistics:
            learner, epoch = self.session.learner, self.session.last_epoch
            cohort.freeze(recipe.frozen_at(epoch))
            images = self._training_images(epoch, between)
            recompute(cohort, images, learner.autocast, learner.ranks)
            for index, state in enumerate(states):
                live = cohort.student_state(index)
                torch._foreach_copy_(list(state.values()), [live[key] for key in state])
        return self._averaged

    def _training_images(self, epoch: int, between: Callable[[], None]) -> Iterator[Tensor]:
        """The first batches of training images of ``epoch``, of its size; of several views the first."""
        for images, _ in islice(self.session.stream.batches(epoch), BATCHES):
            yield images if images.dim() == 4 else images[0]
            between()

    def _scorer(self, cohort: Cohort, method: Method, has_leader: bool) -> Scorer:
        context, test_flip = self.session.learner.autocast, self.session.recipe.test_flip
        return Scorer(cohort, method, has_leader, context, self._captured, test_flip=test_flip)

    def _score(self, scorer: Scorer, between: Callable[[], None]) -> dict[str, dict[str, Any]]:
        ranks, data = self.session.learner.ranks, self.session.data
        return {
            name: scorer.measure(evaluation_stream(split, ranks.data), between, ranks)
            for name, split in (("val", data.val), ("test", data.test))
            if split is not None
        }

    def _averages_apart(self, average: Average) -> Cohort:
        """The averaged students as a cohort of their own."""
        learner, recipe, data = self.session.learner, self.session.recipe, self.session.data
        apart = Cohort(
            [recipe.models[index] for index in average.states],
            learner.cohort.num_classes,
            sharing="network",
            impl=learner.cohort.impl,
            mean=data.mean,
            std=data.std,
            model_options=recipe.model_options,
        )
        apart.to(learner.device).set_memory_format(learner.cohort.memory_format)
        return apart


@torch.no_grad()
def _copy_into(cohort: Cohort, states: Sequence[dict[str, Tensor]]) -> None:
    """Copies weights into the tensors of a cohort, which its graphs read."""
    for index, state in enumerate(states):
        live = cohort.student_state(index)
        torch._foreach_copy_([live[key] for key in state], list(state.values()))


def _of_averages(metrics: dict[str, Any], kept: int, prefix: str = "ema") -> dict[str, Any]:
    """The accuracies of averages; ``kept``: the place of the kept student among them."""
    found = {f"{prefix}_{top}": metrics[f"student_{top}"][kept] for top in ("top1", "top5")}
    if len(metrics["student_top1"]) == 1:
        return found
    return found | {
        f"{prefix}_{name}": value
        for name, value in metrics.items()
        if name.endswith(("_top1", "_top5")) and value is not None
    }
