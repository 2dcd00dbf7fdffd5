"""Students between the papers' authors' files and ours."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fastokd import authors
from fastokd.checkpoint import load_checkpoint, run_checkpoint, write_durably
from fastokd.data.cifar import LAYOUTS
from fastokd.data.preprocessing import preprocessing_of
from fastokd.errors import UserError
from fastokd.student_file import Weights, read_weights


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    student: int | None = None,
    paper: str = "FFSD",
) -> list[str]:
    """Reads an author's checkpoint into a ``student.safetensors``, or writes one for their code.

    Args:
        source: an author's ``.pth``; or a run folder, a checkpoint of one or a
            ``student.safetensors``, for the way back.
        out: the file to write; by default beside the source, as ``.safetensors`` or as
            ``modelleader_best.pth`` (OKDDip: ``best.pth``).
        model: of an author's file, where its keys don't say it.
        student: which of an author's students; the leader where there is one.
        paper: whose format the way back writes.

    Returns:
        What was done and what should be known of it, a line each.

    Raises:
        UserError: files that can't be read or don't fit, an ``out`` that exists already.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(
            f"there is no {source}: name an author's .pth, a run or a student.safetensors"
        )
    ours = source.is_dir() or source.suffix == ".safetensors"
    if ours and (model is not None or student is not None):
        raise UserError(f"{source} is one student of ours and says its model: leave both out")
    if out is None:
        theirs = "modelleader_best.pth" if paper == "FFSD" else "best.pth"
        folder = source if source.is_dir() else source.parent
        out = folder / theirs if ours else source.with_suffix(".safetensors")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten: choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out} can't be written: there is no folder {out.parent}")
    return _to_theirs(source, out, paper) if ours else _to_ours(source, out, model, student)


def _to_ours(source: Path, out: Path, model: str | None, student: int | None) -> list[str]:
    published = authors.read(source, model=model)
    index = published.kept_student if student is None else student
    state = published.student_state(index)
    facts = {"model": published.model, "student": str(index), **_data_facts(published.num_classes)}
    write_durably(out, Weights(out, state, facts).to_bytes())
    role = "the leader, " if published.has_leader and index == published.students - 1 else ""
    which = f" ({role}student {index} of {published.students})" if published.sharing else ""
    return [
        f"{published.model} with {published.num_classes} classes{which}, {published.paper}'s",
        *published.notes,
        f"written to {out}",
    ]


def _data_facts(num_classes: int) -> dict[str, str]:
    """Classes and preprocessing of the CIFAR that has so many classes, as a run's student has."""
    for name, layout in LAYOUTS.items():
        if len(layout.class_names) == num_classes:
            names = json.dumps(list(layout.class_names))
            return {"class_names": names, **preprocessing_of(name).to_facts()}
    return {}


def _to_theirs(source: Path, out: Path, paper: str) -> list[str]:
    weights = read_weights(source)
    model = weights.facts.get("model")
    if model is None:
        raise UserError(f"{source} doesn't say its model: take a run's student.safetensors")
    transfusion, epoch = _transfusion(source, weights)
    authors.save(out, weights.state, model=model, paper=paper, transfusion=transfusion, epoch=epoch)
    lines = [f"{model} for {paper}'s code, written to {out}"]
    if paper == "FFSD" and transfusion is None:
        lines.insert(
            0,
            "the file also needs a transfusion, of which the student has none: it has a new one "
            "for two students, which scores don't depend on",
        )
    return lines


def _transfusion(source: Path, weights: Weights) -> tuple[dict[str, Tensor] | None, int]:
    """The transfusion of an FFSD run or checkpoint beside the student's ``weights``, and the epochs
    that it was trained for."""
    if source.is_file():
        return None, 0
    if weights.path.is_dir():
        tensors, facts = load_checkpoint(weights.path)
    else:
        _, tensors, facts = run_checkpoint(source)
    prefix = "method.transfusion."
    found = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    epoch = facts.get("epoch")
    return found or None, epoch if isinstance(epoch, int) else 0
