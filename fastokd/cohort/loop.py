"""The loop engine: students one after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastokd.cohort.alike import are_alike
from fastokd.cohort.dropout import DropoutMasks
from fastokd.models import Student, StudentOutput
from fastokd.models.layers import Dropout


class LoopStudents:
    """Runs each student from stage ``start`` on over the same input."""

    def __init__(self, students: Sequence[Student], start: int) -> None:
        self.students = tuple(students)
        self.start = start
        # Unequal students have no common places; their dropout draws for itself.
        self.dropout = DropoutMasks(students) if are_alike(students) else None

    def __call__(self, x_BCHW: Tensor) -> list[StudentOutput]:
        """The outputs of each student over the shared ``x_BCHW``."""
        masks = {} if self.dropout is None else self.dropout.draw(x_BCHW)
        for name, mask_SBD in masks.items():
            for student, mask_BD in zip(self.students, mask_SBD, strict=True):
                site = student.get_submodule(name)
                assert isinstance(site, Dropout)
                site.mask_BD = mask_BD
        return [student.outputs(x_BCHW, self.start) for student in self.students]
