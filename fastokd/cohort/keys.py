"""The names of a cohort's state: ``trunk.<key>`` and ``students.<s>.<key>``, each key a student's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
TRUNK, STUDENTS = "trunk", "students"


def student_key(student: int | None, key: str) -> str:
    """The name of ``key`` of one student; None: of the trunk."""
    return f"{TRUNK}.{key}" if student is None else f"{STUDENTS}.{student}.{key}"


def split_key(name: str) -> tuple[int | None, str]:
    """The student whose a name is (None: the trunk's), and the key of its own."""
    if not name.startswith(f"{STUDENTS}."):
        return None, name.removeprefix(f"{TRUNK}.")
    _, student, key = name.split(".", 2)
    return int(student), key


def state_of_student(state: Mapping[str, T], student: int, prefix: str = "") -> dict[str, T]:
    """What of a cohort's ``state`` is one student's, the trunk included, under plain keys.

    ``prefix``: of the cohort's names in ``state``, as in a checkpoint.
    """
    found: dict[str, T] = {}
    for owner in (None, student):
        begin = prefix + student_key(owner, "")
        found |= {k.removeprefix(begin): v for k, v in state.items() if k.startswith(begin)}
    return found
