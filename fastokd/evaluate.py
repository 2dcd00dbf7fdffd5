"""How good the students, the leader and the ensemble are."""

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
    """Every image once, in order, as it is; over all ranks of ``line`` where there are several."""
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
    """Metrics over every image of ``stream``, in eval mode; the mode is restored after.

    ``between`` is called between two batches and may raise. ``ranks``: over their streams together.
    """
    was_training = cohort.training, method.training
    cohort.eval()
    method.eval()
    meter = Meter(len(cohort.students), has_leader)
    try:
        for images_BHWC, labels_B in stream.batches(0):
            if len(labels_B) > 0:  # of a last batch a rank may have nothing
                with context():
                    out = cohort(images_BHWC)
                    watched = method.diagnostics(out)
                meter.update(out.logits_SBC, labels_B, watched)
            between()
    finally:
        cohort.train(was_training[0])
        method.train(was_training[1])
    return meter.result(ranks or Ranks())


def evaluate(
    run_or_checkpoint: str | Path,
    *,
    dataset: str | None = None,
    model: str | None = None,
    options: RunOptions | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores a run folder's newest checkpoint, or one checkpoint, on its data set.

    A file is taken as one of the papers' authors (:mod:`fastokd.student.authors`): it needs a ``dataset``,
    and takes a ``model`` where its keys don't say which it is.

    Returns:
        ``{"val": {...}, "test": {...}}`` with the metrics of ``metrics.jsonl``; ``val`` only where
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
    """Scores the students of one of the authors' checkpoints; raises as :func:`evaluate`."""
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
    """Scores the cohort as it stands on the held-out splits; ``between`` as :func:`measure`."""
    share_state(session.learner)
    splits = {"val": session.data.val, "test": session.data.test}
    results = {
        name: measure(
            session.learner.cohort,
            session.learner.method,
            evaluation_stream(split, session.learner.ranks.data),
            session.recipe.has_leader,
            session.learner.autocast,
            between,
            session.learner.ranks,
        )
        for name, split in splits.items()
        if split is not None
    }
    if session.learner.average is not None:
        lone, nobody = _alone(session, session.learner.average.state)
        for name, split in splits.items():
            if split is not None:
                stream = evaluation_stream(split, session.learner.ranks.data)
                alone = measure(
                    lone,
                    nobody,
                    stream,
                    False,
                    session.learner.autocast,
                    between,
                    session.learner.ranks,
                )
                results[name] |= {f"ema_{top}": alone[f"mean_{top}"] for top in ("top1", "top5")}
    return results


def _alone(session: Session, state: dict[str, Tensor]) -> tuple[Cohort, Method]:
    """The kept student with the weights ``state``, as a cohort of one."""
    name = session.recipe.models[session.recipe.kept_student]
    lone = Cohort(
        (name, 1),
        session.learner.cohort.num_classes,
        sharing="network",
        impl=session.learner.cohort.impl,
        mean=session.data.mean,
        std=session.data.std,
        model_options=session.recipe.model_options,
    )
    lone.students[0].load_state_dict(state)
    lone.to(session.learner.device).set_memory_format(session.learner.cohort.memory_format)
    return lone, create_method("baseline", lone.shape)
