"""The accuracy of the students, the leader and the ensemble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastokd.checkpoint import run_checkpoint
from fastokd.cohort import Cohort
from fastokd.data import BatchStream, DiskSplit, DiskStream, Split, load_dataset, stream_of
from fastokd.device import autocast, pick_precision, set_matmul_precision, use_device
from fastokd.distributed.ranks import Line, Ranks
from fastokd.errors import UserError
from fastokd.learner.shared_state import share_state
from fastokd.methods import Method, create_method
from fastokd.metrics import Meter
from fastokd.recipe.recipe import Recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
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


@torch.no_grad()
def measure(
    cohort: Cohort,
    method: Method,
    stream: BatchStream | DiskStream,
    has_leader: bool,
    context: Any,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Metrics over every image of ``stream``, in eval mode; the mode is restored afterwards.

    ``between`` is called after each batch and may raise. ``ranks``: the metrics are over all their
    streams.
    """
    was_training = cohort.training, method.training
    cohort.eval()
    method.eval()
    meter = Meter(len(cohort.students), has_leader)
    try:
        for images_BHWC, labels_B in stream.batches(0):
            if len(labels_B) > 0:  # a rank may have no image of the last batch
                with context():
                    out = cohort(images_BHWC)
                    watched = method.diagnostics(out)
                meter.update(out.logits_SBC, labels_B, watched)
            between()
    finally:
        cohort.train(was_training[0])
        method.train(was_training[1])
    return meter.result(ranks)


def evaluate(
    run_or_checkpoint: str | Path,
    *,
    dataset: str | None = None,
    model: str | None = None,
    options: RunOptions | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a run folder's newest checkpoint, or one checkpoint, on its data set.

    A file is read as a checkpoint of the papers' authors (:mod:`fastokd.student.authors`): it needs a
    ``dataset``, and a ``model`` if its keys don't determine it.

    Returns:
        ``{"val": {...}, "test": {...}}`` with the metrics of ``metrics.jsonl``; ``val`` only if
        the recipe holds images out.

    Raises:
        UserError: there is no such run or checkpoint, or its data can't be found.
    """
    path = Path(run_or_checkpoint)
    if path.is_file():
        return evaluate_published(path, dataset, model=model, options=options or RunOptions())
    for name, value in (("dataset", dataset), ("model", model)):
        if value is not None:
            raise UserError(f"{name} is {value!r}, but a run has its own: leave it out")
    path, tensors, facts = run_checkpoint(path)
    recipe = Recipe.from_json(facts.get("recipe"))
    session = build(recipe, options or RunOptions(), training=False)
    session.load_state(tensors, facts)
    return evaluate_session(session)


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
    ).to(device)
    if len(data.class_names) != published.num_classes:
        raise UserError(
            f"{path} has {published.num_classes} classes, and {dataset} has "
            f"{len(data.class_names)}: choose another --dataset"
        )
    cohort = published.cohort(mean=data.mean, std=data.std).float()
    cohort.to(device).to(memory_format=torch.channels_last)
    method = create_method("baseline" if cohort.sharing == "network" else "ind", cohort.shape)
    return {
        name: measure(
            cohort,
            method,
            evaluation_stream(split),
            published.has_leader,
            lambda: autocast(device, precision),
        )
        for name, split in (("val", data.val), ("test", data.test))
        if split is not None
    }


def evaluate_session(
    session: Session, between: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Scores the session's cohort on the held-out splits; ``between`` as in :func:`measure`."""
    learner = session.learner
    share_state(learner)
    splits = {"val": session.data.val, "test": session.data.test}

    def score(cohort: Cohort, method: Method, has_leader: bool) -> dict[str, dict[str, Any]]:
        results = {}
        for name, split in splits.items():
            if split is not None:
                stream = evaluation_stream(split, learner.ranks.data)
                results[name] = measure(
                    cohort, method, stream, has_leader, learner.autocast, between, learner.ranks
                )
        return results

    results = score(learner.cohort, learner.method, session.recipe.has_leader)
    if learner.average is not None:
        for name, alone in score(*_alone(session, learner.average.state), False).items():
            results[name] |= {f"ema_{top}": alone[f"mean_{top}"] for top in ("top1", "top5")}
    return results


def _alone(session: Session, state: dict[str, Tensor]) -> tuple[Cohort, Method]:
    """The kept student with the weights ``state``, as a cohort of one."""
    learner, data = session.learner, session.data
    lone = Cohort(
        (session.recipe.models[session.recipe.kept_student], 1),
        learner.cohort.num_classes,
        sharing="network",
        impl=learner.cohort.impl,
        mean=data.mean,
        std=data.std,
        model_options=session.recipe.model_options,
    )
    lone.students[0].load_state_dict(state)
    lone.to(learner.device).set_memory_format(learner.cohort.memory_format)
    return lone, create_method("baseline", lone.shape)
