"""Measures the answers of a run's students on the test images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.checkpoint import write_durably, writing
from fastokd.data import DatasetSplits, DiskSplit, Split, read_all
from fastokd.evaluate import Evaluator, evaluation_stream
from fastokd.measured.answers import FILE, SIDE, Answers, read_answers
from fastokd.recipe.recipe import Recipe
from fastokd.run.beside import beside, measured_on
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

# Most confident mistakes of the kept student whose pictures are kept.
PICTURED = 32


def answers_of(
    run: Run, data: DatasetSplits | None = None, options: RunOptions | None = None
) -> Answers:
    """The answers after the newest step of ``run``: those of its :data:`FILE`, or measured now and kept there.

    They are measured by an evaluation of the newest checkpoint, in the run's precision and on its device
    if that is here. Nothing else of the run changes.

    Args:
        data: the run's data, if they are loaded already.
        options: where the data and the device are, unless where the run had them.

    Raises:
        UserError: the run has no checkpoint, or its data can't be found.
        DiskError: the file can't be written.
    """
    known = read_answers(run)
    if known is not None:
        return known
    with torch.no_grad(), beside(run, data, options, training=False) as session:
        found = _measured(session)
    with writing(run.folder):
        write_durably(run.folder / FILE, found.to_bytes())
    return found


def _images(split: Split | DiskSplit, indices_K: Tensor) -> Tensor:
    """Images of a split, uint8 ``[K, H, W, 3]`` on the CPU."""
    if len(indices_K) == 0:
        return torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
    if isinstance(split, Split):
        images_KHWC = split.images_NHWC[indices_K.to(split.images_NHWC.device)].cpu()
    else:
        images_KHWC = read_all(split.select(indices_K))[0].cpu()
    height, width = images_KHWC.shape[1:3]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return images_KHWC
    small = [max(1, round(side * scale)) for side in (height, width)]
    images_KCHW = images_KHWC.permute(0, 3, 1, 2)
    shrunk_KCHW = F.interpolate(images_KCHW, small, mode="bilinear", antialias=True)
    return shrunk_KCHW.permute(0, 2, 3, 1).contiguous()


def _measured(session: Session) -> Answers:
    scorers = Evaluator(session).scorers()
    for scorer in scorers.values():
        scorer.cohort.eval()
    recipe, split = session.recipe, session.data.test
    peers = recipe.students - recipe.has_leader
    parts: list[tuple[Tensor, ...]] = []
    for images_BHWC, labels_B in evaluation_stream(split).batches(0):
        logits = {name: scorer.logits(images_BHWC) for name, scorer in scorers.items()}
        parts.append(tuple(x.cpu() for x in (labels_B, *_answered(logits, peers))))
    labels_N = torch.cat([part[0] for part in parts])
    choice_MN, confidence_MN = (
        torch.cat([part[place] for part in parts], dim=1) for place in (1, 2)
    )
    names, kept = _rows(recipe, {name: len(logits[name]) for name in scorers}, peers)
    found = Answers(
        session.step,
        labels_N,
        choice_MN,
        confidence_MN,
        names,
        kept,
        tuple(session.data.class_names),
        session.learner.precision,
        measured_on(session.learner.device),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 1, 1, 3, dtype=torch.uint8),
    )
    pictured_K = torch.tensor(found.mistakes(kept, PICTURED), dtype=torch.int64)
    return replace(found, pictured_K=pictured_K, images_KHWC=_images(split, pictured_K))


def _answered(logits: dict[str, Tensor], peers: int) -> tuple[Tensor, Tensor]:
    """Choices and their probabilities, each ``[M, B]``; by the rules of
    :func:`fastokd.metrics.label_rank`."""
    scores_MBC = torch.cat([*logits.values()])
    probs_MBC = F.softmax(scores_MBC, dim=2)
    if peers > 1:
        ensemble_1BC = F.softmax(logits["students"][:peers], dim=2).mean(0)[None]
        scores_MBC = torch.cat([scores_MBC, ensemble_1BC])
        probs_MBC = torch.cat([probs_MBC, ensemble_1BC])
    none_MB = scores_MBC.isnan().any(2)
    choice_MB = scores_MBC.argmax(2)
    confidence_MB = probs_MBC.gather(2, choice_MB[..., None])[..., 0]
    return (
        choice_MB.masked_fill(none_MB, -1),
        confidence_MB.masked_fill(none_MB, 0.0).nan_to_num(0.0),
    )


def _rows(recipe: Recipe, counts: dict[str, int], peers: int) -> tuple[tuple[str, ...], int]:
    """The name of each row, and the row that the run keeps."""
    own = [f"student {index}" for index in range(recipe.students)]
    if recipe.has_leader and recipe.students > 1:
        own[-1] = "leader"
    names, kept, index = [*own], recipe.kept_student, recipe.kept_student
    if "averages" in counts:
        if recipe.keeps_average(index):
            kept = len(names) + recipe.averaged.index(index)
        names += [f"average of {_the(own[student])}" for student in recipe.averaged]
    if "companions" in counts:
        companion = recipe.companion_of(index)
        if companion is not None:
            kept = len(names) + companion
        beside = [f"companion of {name}" for name in own]
        names += beside if counts["companions"] > 1 else ["companion"]
    return (*names, *(["ensemble"] if peers > 1 else [])), kept


def _the(name: str) -> str:
    return f"the {name}" if name == "leader" else name
