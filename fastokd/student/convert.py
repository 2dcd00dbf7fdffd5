"""Converts students between the papers' checkpoints and ``student.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fastokd.checkpoint import list_checkpoints, run_checkpoint, write_durably
from fastokd.data import load_dataset
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets.cifar import CIFAR
from fastokd.errors import UserError
from fastokd.known import place_of
from fastokd.models import model_spec
from fastokd.student import authors
from fastokd.student.file import read_weights
from fastokd.student.weights import Weights

IMAGENET_CLASSES = 1000


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    student: int | None = None,
    paper: str = "FFSD",
    dataset: str | None = None,
    data_root: Path | None = None,
) -> list[str]:
    """Converts an author's checkpoint to a ``student.safetensors``, or a student to an author's format.

    Args:
        source: an author's ``.pth``; or, to write theirs, a run folder, a checkpoint or a
            ``student.safetensors``.
        out: the file to write. Default: beside the source, as ``.safetensors``,
            ``modelleader_best.pth`` (FFSD) or ``best.pth`` (OKDDip).
        model: the model of an author's file, if its keys don't determine it.
        student: the index of an author's student. Default: the leader, or the first student.
        paper: the format to write.
        dataset: the data set of an author's student. Default: the one that the file names, or the
            CIFAR or ImageNet with as many classes.
        data_root: the folder of that data set. An image folder's classes, mean and deviation are
            read from it, and ImageNet's class names, which are numbers without it.

    Returns:
        What was done, and notes for the user, a line each.

    Raises:
        UserError: a file can't be read or doesn't fit, or ``out`` exists.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(
            f"there is no {source}: name an author's .pth, a run or a student.safetensors"
        )
    ours = source.is_dir() or source.suffix == ".safetensors"
    if ours and (model, student, dataset, data_root) != (None,) * 4:
        raise UserError(
            f"{source} is a fastokd student, which names its model and data: leave --model, "
            "--student, --dataset and --data-root out"
        )
    if out is None:
        theirs = "modelleader_best.pth" if paper == "FFSD" else "best.pth"
        folder = source if source.is_dir() else source.parent
        out = folder / theirs if ours else source.with_suffix(".safetensors")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already and is never overwritten: choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out} can't be written: there is no folder {out.parent}")
    if ours:
        return _to_theirs(source, out, paper)
    published = authors.read(source, model=model)
    return _to_ours(source, out, published, student, dataset, data_root)


def _to_ours(
    source: Path,
    out: Path,
    published: authors.Published,
    student: int | None,
    dataset: str | None,
    data_root: Path | None,
) -> list[str]:
    index = published.kept_student if student is None else student
    state = published.student_state(index)
    name = dataset or _dataset_of(source, published)
    role = "the leader, " if published.has_leader and index == published.students - 1 else ""
    which = f" ({role}student {index} of {published.students})" if published.sharing else ""
    facts = {
        "model": published.model,
        "model_options": "{}",
        **_data_facts(source, published, name, data_root),
        "student": json.dumps(index),
        "role": json.dumps(which.strip(" ()") or "the only student"),
        "converted_from": json.dumps(published.paper),
    }
    write_durably(out, Weights(out, state, facts).to_bytes())
    return [
        f"{published.model} with {published.num_classes} classes{which}, {published.paper}'s",
        f"its pictures and classes are {name}'s" + ("" if dataset else ": --dataset names another"),
        *published.notes,
        f"written to {out}",
    ]


def _dataset_of(source: Path, published: authors.Published) -> str:
    """The data set that the file names, or one of the network's published sets with as many classes."""
    named = (published.dataset or "").lower().replace("-", "").replace("_", "")
    if named in (*CIFAR, "imagenet"):
        return named
    C, small = published.num_classes, model_spec(published.model).input_size == 32
    of_classes = {len(cifar.class_names): name for name, cifar in CIFAR.items()}
    found = of_classes.get(C) if small else {IMAGENET_CLASSES: "imagenet"}.get(C)
    if found is None:
        raise UserError(
            f"{source} doesn't name its {C} classes: add --dataset, such as cifar10, imagenet or "
            "imagefolder"
        )
    return found


def _data_facts(
    source: Path, published: authors.Published, dataset: str, root: Path | None
) -> dict[str, str]:
    """Facts on the classes and the preprocessing of a data set."""
    C = published.num_classes
    if dataset in CIFAR:
        names, shown = CIFAR[dataset].class_names, preprocessing_of(dataset)
    elif root is None and dataset == "imagenet":
        names, shown = tuple(map(str, range(IMAGENET_CLASSES))), preprocessing_of(dataset)
    else:
        own = place_of(dataset)[0] in ("hf", "imagefolder", "wds")
        size = model_spec(published.model).input_size if own else None
        data = load_dataset(dataset, root, image_size=size)
        names, shown = data.class_names, data.preprocessing
    if len(names) != C:
        raise UserError(
            f"{source} has {C} classes, and {dataset} has {len(names)}: choose another --dataset"
        )
    return {"class_names": json.dumps(list(names)), **shown.to_facts()}


def _to_theirs(source: Path, out: Path, paper: str) -> list[str]:
    weights = read_weights(source)
    model = weights.model
    transfusion, epoch = _transfusion(source, weights)
    authors.save(out, weights.state, model=model, paper=paper, transfusion=transfusion, epoch=epoch)
    note = (
        "the file also needs a transfusion, and the student has none: a new one for two students is "
        "written, which doesn't change the scores"
    )
    missing = paper == "FFSD" and transfusion is None
    return [*([note] if missing else []), f"{model} for {paper}'s code, written to {out}"]


def _transfusion(source: Path, weights: Weights) -> tuple[dict[str, Tensor] | None, int]:
    """The transfusion of an FFSD run or checkpoint, and the epochs that it was trained for."""
    saved = weights.path
    if saved.is_file():
        saved = source
        if not list_checkpoints(source / "checkpoints"):  # a file, or a run without them
            return None, 0
    _, tensors, facts = run_checkpoint(saved)
    prefix = "method.transfusion."
    found = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    epoch = facts.get("epoch")
    return found or None, epoch if isinstance(epoch, int) else 0
