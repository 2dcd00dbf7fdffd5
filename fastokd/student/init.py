"""``--init``: initialises students from trained weights.

One file initialises every student, or each student has its own file. A classifier for other classes
is replaced by a new one. Equal students would stay equal, since they are trained on the same images,
so only the kept student takes the file's classifier; the others have new ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.host.names import first_names
from fastokd.models import Student, create_model
from fastokd.student import authors
from fastokd.student.file import read_weights
from fastokd.student.published_keys import METHOD_KEYS, SHOWN, described, faults_of, sharing_of
from fastokd.student.torch_file import is_safetensors, state_dict_in
from fastokd.student.weights import Weights
from fastokd.student.wrappers import network_in

# Auxiliary heads of torchvision's GoogLeNet and Inception, which students don't have.
AUXILIARY = ("aux", "AuxLogits.")

# The weights in a file, and notes for the user on how they were chosen.
InitFile = tuple[Weights, list[str]]


def read_files(paths: Iterable[str | Path]) -> list[InitFile]:
    """Reads each file once: a run, a checkpoint, a student, or a state dict of another trainer.

    Raises:
        UserError: a file is missing, can't be read or holds code.
    """
    names = [Path(path) for path in paths]
    found = {path: read_one(path, "--init") for path in dict.fromkeys(names)}
    return [found[path] for path in names]


def begin_from(
    cohort: Cohort, files: Sequence[InitFile], class_names: Sequence[str], kept: int
) -> list[str]:
    """Initialises all students from one file, or each from its own (the leader's last).

    Args:
        class_names: the data set's. A classifier for other classes is replaced.
        kept: the index of the kept student.

    Returns:
        What was loaded from each file and what wasn't, a sentence each.

    Raises:
        UserError: the number of files is neither 1 nor that of the students; keys are missing, extra
            or of another shape.
    """
    S = len(cohort.students)
    paths = [weights.path for weights, _ in files]
    if len(paths) not in (1, S):
        raise UserError(f"--init names {len(paths)} files for {S} students: give one, or {S}")
    if cohort.trunk is not None and len(set(paths)) > 1:
        raise UserError("--init names several files, but a branch cohort shares a trunk: give one")
    notes: list[str] = []
    for path, (given, chosen) in dict(zip(paths, files, strict=True)).items():
        mine = [s for s in range(S) if paths[s if len(paths) > 1 else 0] == path]
        notes += _fill(cohort, mine, given, class_names, kept) + chosen
    return notes


def _fill(
    cohort: Cohort, mine: list[int], given: Weights, class_names: Sequence[str], kept: int
) -> list[str]:
    """Initialises the students ``mine`` from one file."""
    names = {cohort.model_names[s] for s in mine}
    if len(names) > 1:
        raise UserError(
            f"{given.path} can't initialise both {' and '.join(sorted(names))}: give one --init a "
            "student"
        )
    (name,) = names
    C, options = cohort.num_classes, cohort.model_options
    classifier = classifier_of(name, C, options)
    state, left_out, chosen = fitting(given, name, C, options, classifier)
    known = list(given.fact("class_names")) if "class_names" in given.facts else None
    why = ""
    if any(key not in state for key in classifier) or (known and known != list(class_names)):
        why = _other_classes(given, known, class_names)
        state = {key: value for key, value in state.items() if key not in classifier}
    notes = [f"{name} begins from {given.path}", *chosen]
    if left_out:
        notes.append(f"left out, as auxiliary: {first_names(left_out, SHOWN)}")
    if why:
        notes.append(f"{why}: each student begins with a new classifier ({', '.join(classifier)})")
    elif len(mine) > 1:
        holder = kept if kept in mine else mine[0]
        notes.append(
            f"its classifier is student {holder}'s; the others have new ones, since equal students "
            "stay equal"
        )
    else:
        holder = mine[0]
    for s in mine:
        own = state
        if not why and s != holder:
            own = {key: value for key, value in state.items() if key not in classifier}
        _load(cohort.students[s], own)
    if cohort.trunk is not None:
        _load(cohort.trunk, state)
    return notes


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads the entries of ``state`` that the module has."""
    own = module.state_dict().keys()
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def classifier_of(name: str, classes: int, options: dict[str, Any]) -> list[str]:
    """The keys whose shapes depend on the number of classes."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        states = [create_model(name, c, **options).state_dict() for c in (classes, classes + 1)]
    return [key for key, value in states[0].items() if value.shape != states[1][key].shape]


def fitting(
    given: Weights,
    name: str,
    num_classes: int,
    options: dict[str, Any],
    classifier: Collection[str],
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The file's entries under the keys of the student ``name``, without a classifier of another shape;
    the auxiliary keys left out; and notes for the user.

    Raises:
        UserError: the other keys don't fit, or weights are integers.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Student = create_model(name, num_classes, **options)
    wanted = model.state_dict()
    ours = {model.published_key(key): key for key in wanted}

    def is_network(keys: Iterable[str], *, whole: bool) -> bool:
        found = {ours.get(key, key) for key in keys}
        needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
        if whole:
            needed -= set(classifier)
        return needed <= found and all(k in wanted or k.startswith(AUXILIARY) for k in found)

    theirs, chosen = network_in(given.path, given.state, is_network)
    state = {ours.get(key, key): value for key, value in theirs.items()}
    left_out = [key for key in state if key not in wanted and key.startswith(AUXILIARY)]
    layout = {key: (key, value.shape) for key, value in wanted.items()}
    for key in classifier:
        if key not in state or state[key].shape != layout[key][1]:
            del layout[key]
    for key in [*left_out, *(key for key in classifier if key not in layout)]:
        state.pop(key, None)
    faults = faults_of(state, layout)
    if faults:
        raise UserError(f"{given.path} is no {name}: {described(faults)[1]}")
    for key, value in state.items():
        if wanted[key].is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{given.path} has {model.published_key(key)} in {kind}, but weights must be floating "
                "point: dequantise it and save it again"
            )
    return state, left_out, chosen


def _other_classes(given: Weights, known: list[str] | None, ours: Sequence[str]) -> str:
    if known is None:
        return f"{given.path} was trained for other classes than these {len(ours)}"
    return f"{given.path} has {first_names(known, SHOWN)}, not {first_names(list(ours), SHOWN)}"


def read_one(path: Path, option: str) -> InitFile:
    """Reads one file, which ``option`` names; an author's cohort gives its kept student."""
    if not path.exists():
        raise UserError(f"{option} is {path}, and there is no such file")
    if path.is_dir() or path.suffix == ".safetensors" or is_safetensors(path):
        return read_weights(path), []
    found = state_dict_in(path)
    if sharing_of(found.weights)[0] is not None:
        published = authors.read(path)
        return Weights(path, published.student_state(published.kept_student), {}), []
    own = {key: v for key, v in found.weights.items() if not key.startswith(METHOD_KEYS)}
    return Weights(path, own, {}), list(found.notes)
