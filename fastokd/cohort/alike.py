"""Whether students are of one architecture, so that their weights can be stacked."""

from __future__ import annotations

from collections.abc import Sequence

from fastokd.models import Student


def are_alike(students: Sequence[Student]) -> bool:
    """Whether all have the same layers by the same names, and tensors of the same shapes.

    Their class doesn't say: a ResNet-8 and a ResNet-20 are of one.
    """

    def layers(student: Student) -> object:
        modules = [(name, type(module)) for name, module in student.named_modules()]
        return modules, [(name, value.shape) for name, value in student.state_dict().items()]

    return all(layers(student) == layers(students[0]) for student in students[1:])
