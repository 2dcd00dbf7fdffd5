"""How good the students, the leader and the ensemble are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastokd.checkpoint import load_checkpoint, newest_checkpoint
from fastokd.cohort import Cohort
from fastokd.data import BatchStream
from fastokd.errors import UserError
from fastokd.methods import Method
from fastokd.metrics import Meter
from fastokd.recipes import Recipe
from fastokd.session import RunOptions, Session, evaluation_stream


@torch.no_grad()
def measure(
    cohort: Cohort, method: Method, stream: BatchStream, has_leader: bool, context: Any
) -> dict[str, Any]:
    """Metrics over every image of ``stream``, in eval mode; the mode is restored after."""
    was_training = cohort.training
    cohort.eval()
    meter = Meter(len(cohort.students), has_leader)
    try:
        for images_BHWC, labels_B in stream.batches(0):
            with context():
                out = cohort(images_BHWC)
                watched = method.diagnostics(out)
            meter.update(out.logits_SBC, labels_B, watched)
    finally:
        cohort.train(was_training)
    return meter.result()


def evaluate(
    run_or_checkpoint: str | Path, *, options: RunOptions | None = None
) -> dict[str, dict[str, Any]]:
    """Scores a run folder's newest checkpoint, or one checkpoint, on its data set.

    Returns:
        ``{"val": {...}, "test": {...}}`` with the metrics of ``metrics.jsonl``; ``val`` only where
        the recipe holds images out.

    Raises:
        UserError: there is no such run or checkpoint, or its data can't be found.
    """
    path = Path(run_or_checkpoint)
    if (path / "checkpoints").is_dir():
        path, tensors, facts, _ = newest_checkpoint(path / "checkpoints")
    elif path.exists():
        tensors, facts = load_checkpoint(path)
    else:
        raise UserError(f"there is no run or checkpoint at {path}")
    session = Session(Recipe.from_json(facts["recipe"]), options or RunOptions())
    session.load_state(tensors, facts)
    return evaluate_session(session)


def evaluate_session(session: Session) -> dict[str, dict[str, Any]]:
    """Scores the cohort as it stands on the held-out splits."""
    splits = {"val": session.data.val, "test": session.data.test}
    return {
        name: measure(
            session.cohort,
            session.method,
            evaluation_stream(split),
            session.recipe.has_leader,
            session.autocast,
        )
        for name, split in splits.items()
        if split is not None
    }
