"""Whether students have the same architecture, and a copy of one on the meta device."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models import Student

# Attributes of every module: its state and children, which are compared by name, and its hooks.
_TORCHS = frozenset(vars(nn.Module())) - {"training"}
_VALUES = (int, float, str, types.FunctionType, types.BuiltinFunctionType, torch.dtype)


def are_alike(students: Sequence[Student]) -> bool:
    """Whether all have the same layers with the same settings, and tensors of the same shapes.

    The class and the shapes don't suffice: a ResNet-8 and a ResNet-20 have the same class, and
    layers with the same weights may differ in stride, padding or activation.
    """

    def layers(student: Student) -> list[tuple[str, type[nn.Module]]]:
        modules = student.named_modules(remove_duplicate=False)
        return [(name, type(module)) for name, module in modules]

    def shapes(student: Student) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in _state(student).items()}

    first = students[0]
    return all(
        layers(other) == layers(first)
        and shapes(other) == shapes(first)
        and all(_same_settings(a, b) for a, b in zip(first.modules(), other.modules(), strict=True))
        for other in students[1:]
    )


def _state(student: Student) -> dict[str, Tensor]:
    """Every tensor under each of its names; tied weights have several."""
    parameters = student.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(student.named_buffers(remove_duplicate=False))}


def _same_settings(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = ({k: v for k, v in vars(m).items() if k not in _TORCHS} for m in (a, b))
    return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, or of one type where their values can't be compared."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and (a.is_meta or torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if a is None or isinstance(a, _VALUES):
        return bool(a == b)
    return True


def template_of(
    students: Sequence[Student], engine: str, dtype: torch.dtype | None = None
) -> Student:
    """A copy of the first of equal ``students`` on the meta device; ties are kept. Floating-point
    tensors become ``dtype`` if it is given.

    Raises:
        UserError: the students differ, or can't be copied.
    """
    if not are_alike(students):
        raise UserError(f"engine={engine!r} stacks equal students, not a mixed cohort: use loop")
    student = students[0]
    memo: dict[int, Any] = {}
    for module in student.modules():
        for value in vars(module).values():
            # Recomputed from parameters before each call, as by torch's old weight norm.
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach()
    for value in _state(student).values():
        meta = value.detach().to("meta", dtype if value.is_floating_point() else None)
        if isinstance(value, nn.Parameter):
            meta = nn.Parameter(meta, value.requires_grad)
        memo[id(value)] = meta
    try:
        return copy.deepcopy(student, memo)
    except Exception as error:  # raised by the student's own code
        raise UserError(f"engine={engine!r} can't copy the students ({error}): use loop") from error
