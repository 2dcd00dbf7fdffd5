"""The loop engine: students one after another, but for the convolutions of what they all read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastokd.cohort.alike import are_alike
from fastokd.cohort.dropout import DropoutMasks
from fastokd.cohort.shared import SharedConvs
from fastokd.models import Student, StudentOutput
from fastokd.models.layers import Dropout


class LoopStudents:
    """Runs each student from stage ``start`` on over the same input.

    ``x_BCHW``: an example of that input on the meta device, where the students are equal.
    """

    def __init__(
        self, students: Sequence[Student], start: int, x_BCHW: Tensor | None = None
    ) -> None:
        self.students = tuple(students)
        self.start = start
        # Unequal students have no common places; their dropout draws for itself.
        alike = are_alike(students)
        self.dropout = DropoutMasks(students) if alike else None
        self.shared: SharedConvs | None = None
        if alike and len(students) > 1 and x_BCHW is not None:
            self.shared = SharedConvs(students, start, x_BCHW)

    def __call__(self, x_BCHW: Tensor) -> list[StudentOutput]:
        """The outputs of each student over the shared ``x_BCHW``."""
        training = self.students[0].training
        masks = {} if self.dropout is None else self.dropout.draw(x_BCHW, training)
        for name, mask_SBD in masks.items():
            for student, mask_BD in zip(self.students, mask_SBD, strict=True):
                site = student.get_submodule(name)
                assert isinstance(site, Dropout)
                site.mask_BD = mask_BD
        if self.shared is not None:
            self.shared.give(x_BCHW)
        try:
            return [student.outputs(x_BCHW, self.start) for student in self.students]
        except BaseException:  # memory that ran out: what fits is looked for afterwards
            if self.shared is not None:
                self.shared.forget()
            raise
