"""The loop engine: students one after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastokd.cohort.alike import are_alike
from fastokd.cohort.dropout import DropoutMasks, give
from fastokd.models import Student, StudentOutput


class LoopStudents:
    """Runs each student from stage ``start`` on over the same input."""

    def __init__(self, students: Sequence[Student], start: int) -> None:
        self.students = tuple(students)
        self.start = start
        # Masks are drawn together only for equal students; else each dropout layer draws its own.
        self.dropout = DropoutMasks(students) if are_alike(students) else None

    def __call__(self, x_BCHW: Tensor) -> list[StudentOutput]:
        """The outputs of each student over the shared ``x_BCHW``."""
        training = self.students[0].training
        masks = {} if self.dropout is None else self.dropout.draw(x_BCHW, training)
        for index, student in enumerate(self.students):
            give(student, {name: mask_SBD[index] for name, mask_SBD in masks.items()})
        return [student.outputs(x_BCHW, self.start) for student in self.students]
