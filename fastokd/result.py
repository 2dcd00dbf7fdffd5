"""A run that was trained: what it measured, its student, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastokd.data.preprocessing import Preprocessing
from fastokd.errors import UserError, unknown_name
from fastokd.host.names import counted
from fastokd.measured.answering import answers_of
from fastokd.measured.answers import Answers
from fastokd.measured.cost import Cost, cost_of
from fastokd.models import Student
from fastokd.report import page
from fastokd.report.pictures import Picture, pictures
from fastokd.run import folder
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.student.file import read_weights


class Run(folder.Run):
    """A run, finished or not: ``folder``, ``recipe`` and ``metrics``, a row an epoch.

    :func:`fastokd.train` returns one, and :meth:`load` reads one back. It may be given wherever a
    path to a run may: ``fastokd.evaluate(run)``, ``fastokd.export(run, "onnx")``.
    """

    def __repr__(self) -> str:
        at = self.standing
        lines = [
            f"Run of {self.recipe.name}, seed {self.recipe.seed}, in {self.folder}",
            f"{at.epochs} of {counted(self.recipe.epochs, 'epoch')}, {counted(at.step, 'step')}",
        ]
        try:
            lines.append(str(summarise(self)))
        except UserError:
            lines.append("no measured epoch yet")
        return "\n  ".join(lines)

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the best epoch, which is chosen on ``val`` if the run has it, else on
        ``test``.

        Raises:
            UserError: no epoch was measured yet.
        """
        epoch = summarise(self).best_epoch
        return next(row for row in self.metrics if row["epoch"] + 1 == epoch)

    def student(self, index: int | None = None, *, best: bool = False) -> Student:
        """A trained student in eval mode, on the CPU, as :func:`fastokd.export` writes it.

        It takes images ``[B, 3, H, W]`` in float32, normalised by :attr:`preprocessing`, and
        returns logits ``[B, C]``.

        Args:
            index: counted from 0; by default the one that the recipe keeps, the leader.
            best: the weights of the best epoch in place of the last.

        Raises:
            UserError: the index is out of range, or the run has no weights yet.
        """
        return read_weights(self.folder, student=index, best=best).build()

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the student's input: ``read(path)`` gives uint8 ``[H, W, 3]``, and
        ``normalized(images_BHWC)`` makes ``[B, 3, H, W]`` of uint8 images."""
        return read_weights(self.folder).preprocessing

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the run's page with its plots, by default ``report.html`` in its folder."""
        return page.report([self.folder], out)

    def answers(self, options: RunOptions | None = None) -> Answers:
        """What each student says on every test image after the newest step; measured, and kept in the run's
        folder, unless it is there. Arguments and errors are those of
        :func:`fastokd.measured.answering.answers_of`."""
        return answers_of(self, options=options)

    def cost(self, options: RunOptions | None = None) -> Cost:
        """The seconds of a training step by its parts; as :meth:`answers`, of
        :func:`fastokd.measured.cost.cost_of`."""
        return cost_of(self, options=options)

    def plot(self, name: str = "accuracy") -> Picture:
        """One figure of the report, which a notebook shows: ``"accuracy"``, ``"loss"``,
        ``"diversity"`` or ``"attention"``.

        Raises:
            UserError: no such figure can be drawn of this run.
        """
        found = pictures(self)
        if name not in found:
            raise unknown_name("figure", name, found)
        return found[name]
