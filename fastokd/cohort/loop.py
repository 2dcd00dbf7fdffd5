"""The loop engine: students one after another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fastokd.models import Student, StudentOutput


def run_loop(students: Iterable[Student], x_BCHW: Tensor, start: int) -> list[StudentOutput]:
    """Runs each student from stage ``start`` on over the same input."""
    return [student.outputs(x_BCHW, start) for student in students]
