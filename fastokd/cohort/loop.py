"""The loop engine: students one after another, or each on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastokd.cohort.alike import are_alike
from fastokd.cohort.dropout import DropoutMasks, give
from fastokd.cohort.shadows import narrowed, sites_of
from fastokd.cohort.streams import Streams, side_by_side
from fastokd.cohort.views import for_each
from fastokd.models import Student, StudentOutput


class LoopStudents:
    """Runs each student from stage ``start`` on.

    ``streams``: where they run side by side; None for one after another.
    """

    def __init__(
        self, students: Sequence[Student], start: int, streams: Streams | None = None
    ) -> None:
        self.students = tuple(students)
        self.start = start
        self.streams = streams
        self.sites = {student: sites_of(student) for student in students}
        # Masks are drawn together only for equal students; else each dropout layer draws its own.
        self.dropout = DropoutMasks(students) if are_alike(students) else None

    def __call__(self, read: Sequence[Tensor]) -> list[StudentOutput]:
        """The outputs of each student over what it reads, or over the one that all read."""
        training = self.students[0].training
        masks = {} if self.dropout is None else self.dropout.draw(read[0], training)
        pairs = zip(self.students, for_each(read, len(self.students)), strict=True)
        calls = [
            (student, x_BCHW, {name: mask_SBD[index] for name, mask_SBD in masks.items()})
            for index, (student, x_BCHW) in enumerate(pairs)
        ]
        if self.streams is not None:
            self.streams.begin()
        return side_by_side(self._outputs, calls, self.streams)

    def _outputs(
        self, student: Student, x_BCHW: Tensor, masks: Mapping[str, Tensor]
    ) -> StudentOutput:
        give(student, masks)
        with narrowed(self.sites[student]):
            return student.outputs(x_BCHW, self.start)
