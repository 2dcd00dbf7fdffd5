"""Reads and writes the checkpoints of the papers' authors; loading one runs no code.

FFSD's hold ``{"weight", "epoch", "cfg", "index"}`` with one network; the leader's also has the
transfusion (``trans_fusion_module``). OKDDip's hold ``{"state_dict", "epoch", "optim_dict", ...}``
with one network, separate students ``stu0..``, or a trunk with branches ``layer3_0..``; the method's
projections (``query_weight``, ``key_weight``) or gate (``control_v1``, ``bn_v1``) are beside them. A
leader is the last student. All keys may have DataParallel's prefix ``module.``.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastokd.checkpoint import write_durably
from fastokd.cohort import Cohort
from fastokd.cohort.keys import state_of_student, student_key
from fastokd.errors import UserError, as_path
from fastokd.methods.ffsd_modules import Squeeze
from fastokd.models import Student, create_model
from fastokd.student.published_keys import (
    BRANCHES,
    FFSD_NAMES,
    OKDDIP_NAMES,
    classes_of,
    described,
    faults_of,
    keys_of,
    method_keys,
    our_name,
    renamed,
    sharing_of,
)
from fastokd.student.torch_file import StateDict, state_dict_in

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Published:
    """One of the authors' checkpoints under our keys.

    Attributes:
        paper: ``"FFSD"``, ``"OKDDip"`` or ``"another trainer"``.
        sharing: ``"branch"`` or ``"network"``; None for a file of one network.
        has_leader: the last of several students is the leader.
        state: the student's state if ``sharing`` is None, else the cohort's.
        method_state: the method's projections, gate or transfusion.
        notes: notes for the user, a sentence each.
        dataset: the data set that the options in the file name, or None.
    """

    paper: str
    model: str
    num_classes: int
    sharing: str | None
    students: int
    has_leader: bool
    state: dict[str, Tensor]
    method_state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    dataset: str | None = None

    @property
    def kept_student(self) -> int:
        """The leader, or the first student if there is none."""
        return self.students - 1 if self.has_leader else 0

    def student_state(self, index: int) -> dict[str, Tensor]:
        """The state of student ``index``, without prefixes."""
        if not 0 <= index < self.students:
            raise UserError(f"student is {index}, but the file has 0 to {self.students - 1}")
        if self.sharing is None:
            return self.state
        return state_of_student(self.state, index)

    def student(self, index: int | None = None) -> Student:
        """Student ``index`` (default: the kept one) in eval mode."""
        state = self.student_state(self.kept_student if index is None else index)
        student = create_model(self.model, self.num_classes)
        return _filled(student, state)

    def cohort(self, **options: Any) -> Cohort:
        """All students in eval mode; ``options`` are :class:`fastokd.Cohort`'s."""
        cohort = Cohort(
            (self.model, self.students),
            self.num_classes,
            sharing=self.sharing or "network",
            **options,
        )
        state = self.state
        if self.sharing is None:
            state = {student_key(0, key): value for key, value in state.items()}
        return _filled(cohort, state)


def load(
    path: str | Path, *, model: str | None = None, num_classes: int | None = None
) -> Student | Cohort:
    """One of the authors' checkpoints as a module in eval mode.

    Args:
        path: FFSD's ``model*.pth`` or OKDDip's ``last.pth`` and ``best.pth``.
        model: fastokd's name or the authors'. Default: determined by the keys and shapes.
        num_classes: C. Default: the classifier's.

    Returns:
        The student if the file holds one, else the cohort (a leader is last). The dtype is float64
        if the file has float64 tensors, else float32.

    Raises:
        UserError: the file can't be read or holds code, keys are missing or extra, or shapes
            don't fit.
    """
    published = read(path, model=model, num_classes=num_classes)
    return published.student() if published.sharing is None else published.cohort()


def read(
    path: str | Path, *, model: str | None = None, num_classes: int | None = None
) -> Published:
    """As :func:`load`, but returns the file's content."""
    path = as_path("the checkpoint", path)
    found = _found(path)
    weights, facts = found.weights, found.beside
    paper = {"weight": "FFSD", "state_dict": "OKDDip"}.get(found.place, "another trainer")
    if facts.get("index") == "fusion":
        raise UserError(
            f"{path} holds FFSD's fusion module, not a student: take modelleader_best.pth"
        )
    sharing, students = sharing_of(weights)
    names = _candidates(path, model, paper, sharing, facts.get("cfg"))
    classes = num_classes or classes_of(weights)

    nearest: tuple[int, str] | None = None
    for name in names:
        keys = keys_of(name, classes, sharing, students)
        extras = method_keys(weights, name, sharing, students)
        faults = faults_of(weights, {**keys, **extras})
        if not faults:
            return Published(
                paper,
                name,
                classes,
                sharing,
                students,
                has_leader=sharing is not None and "query_weight.weight" in weights,
                state=renamed(weights, keys),
                method_state=renamed(weights, extras),
                notes=(*found.notes, *_notes(name, sharing, weights)),
                dataset=_option(facts.get("cfg"), "dataset"),
            )
        count, text = described(faults)
        if nearest is None or count < nearest[0]:
            nearest = count, f"{name} with {classes} classes: {text}"
    assert nearest is not None
    what = "isn't" if model else "is none of the published networks; it is nearest to"
    raise UserError(f"{path} {what} {nearest[1]}")


def save(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    model: str,
    paper: str = "FFSD",
    transfusion: Mapping[str, Tensor] | None = None,
    epoch: int = 0,
) -> None:
    """Writes one student in an author's format, readable by torch 1.0 and later.

    Args:
        path: replaced if it exists. FFSD's ``test.py`` reads it as ``--load_path``.
        state: the student's state, without prefixes.
        model: fastokd's name of the model.
        paper: ``"FFSD"``: a leader, as ``modelleader_best.pth``. ``"OKDDip"``: one network, as
            ``best.pth``, such as the teacher of ``train_kd.py``.
        transfusion: the state of the method's ``transfusion``. FFSD's ``test.py`` requires one, but
            its scores don't depend on it. Default: a new one for two students.

    Raises:
        UserError: the paper lacks the model, or the state isn't this model's.
    """
    published = {"FFSD": FFSD_NAMES, "OKDDip": OKDDIP_NAMES}.get(paper)
    if published is None:
        raise UserError(f"paper is {paper!r}: choose FFSD or OKDDip")
    if model not in published:
        raise UserError(f"{paper} has no {model}: it has {', '.join(sorted(published))}")
    faults = faults_of(state, keys_of(model, classes_of(state), None, 1))
    if faults:
        raise UserError(f"the state isn't {model}'s: {described(faults)[1]}")
    weights = {key: value.detach().cpu().clone() for key, value in state.items()}
    content: dict[str, Any] = {"state_dict": weights, "epoch": epoch}
    if paper == "FFSD":
        width = create_model(model, 2).feature_dim
        own = Squeeze(width, 2 * width).state_dict() if transfusion is None else transfusion
        weights |= {f"trans_fusion_module.{k}": v.detach().cpu().clone() for k, v in own.items()}
        name = published[model]
        content = {"weight": weights, "epoch": epoch, "cfg": name, "index": "leader"}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    write_durably(Path(path), buffer.getvalue())


def _found(path: Path) -> StateDict:
    found = state_dict_in(path)
    # ONE's DenseNet names its branches layer3_N, as ResNets do; OKDDip's names them BranchN.
    rename = re.compile(r"^layer3_(\d+)\.denselayer")
    weights = {rename.sub(r"Branch\1.denselayer", key): v for key, v in found.weights.items()}
    return replace(found, weights=weights)


def _candidates(
    path: Path, model: str | None, paper: str, sharing: str | None, cfg: Any
) -> list[str]:
    """The models that the file may hold, the likeliest first."""
    if model is not None:
        name = our_name(model)
        if sharing == "branch" and name not in BRANCHES:
            raise UserError(f"{path} holds branches, and {model} has no published branch form")
        return [name]
    if paper != "FFSD":
        return list(dict.fromkeys([*OKDDIP_NAMES, *FFSD_NAMES]))
    # FFSD's files hold the model's name, or all options.
    hint = our_name(_option(cfg, "model") or str(cfg))
    return sorted(FFSD_NAMES, key=lambda name: name != hint)


def _option(cfg: Any, name: str) -> str | None:
    """One of the options in a file of FFSD, or None."""
    options = vars(cfg) if isinstance(cfg, argparse.Namespace) else cfg
    value = options.get(name) if isinstance(options, dict) else None
    return value if isinstance(value, str) else None


def _notes(model: str, sharing: str | None, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    notes = (
        "the published branches of DenseNet share the last block: each student has a copy",
        "the published leader of this network skips the final norm, but no student here does: the "
        "last student is a peer with the same weights",
    )
    if model != "densenet_40_12" or sharing != "branch":
        return ()
    return notes if "query_weight.weight" in weights else notes[:1]


def _filled(module: M, state: dict[str, Tensor]) -> M:
    wide = any(value.dtype == torch.float64 for value in state.values())
    module.to(torch.float64 if wide else torch.float32)
    module.load_state_dict(state)
    return module.eval()
