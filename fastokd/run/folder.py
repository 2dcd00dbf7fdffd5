"""A run's folder: recipe, environment, metrics, checkpoints, the student, the report."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fastokd.checkpoint import (
    checkpoint_step,
    link_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
    write_durably,
    writing,
)
from fastokd.data.held_out import DATA
from fastokd.distributed.ranks import first, speaks
from fastokd.errors import (
    DataFileError,
    DiskError,
    LoaderError,
    UserError,
    as_path,
    in_one_line,
    warn,
)
from fastokd.known import place_of
from fastokd.metrics import MetricLines, choosing_split
from fastokd.models import Student
from fastokd.recipe.recipe import Recipe
from fastokd.run.autotuner import Timing
from fastokd.run.facts import RunFacts, run_path
from fastokd.run.identity import begun_with, check_recipe, continues, other_teacher
from fastokd.run.lock import FolderLock
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.standing import Standing, standing
from fastokd.run.taught import write_taught
from fastokd.run.writer import HostCopies, Writer
from fastokd.student.file import run_rows, student_of
from fastokd.student.teacher import to_keep
from fastokd.student.weights import STUDENT, Weights
from fastokd.student.within_cohort import check_kept

R = TypeVar("R", bound="Run")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run: its folder, its recipe and its metrics."""

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last epoch."""
        return self.metrics[-1]

    @property
    def seconds(self) -> float:
        """The seconds of training, without evaluation."""
        return float(sum(row["seconds"] for row in self.metrics))

    @property
    def standing(self) -> Standing:
        """Its whole epochs and its steps."""
        return standing(self.folder, self.metrics)

    @property
    def is_whole(self) -> bool:
        """Whether it has all epochs of its recipe."""
        return self.standing.epochs >= self.recipe.epochs

    @classmethod
    def load(cls: type[R], folder: str | Path) -> R:
        """Reads a run folder back.

        Raises:
            UserError: it is no run folder, or its recipe or metrics are damaged.
        """
        where = RunFolder(folder)
        return cls(where.path, where.recipe(), where.metrics())

    def __fspath__(self) -> str:
        """The folder: a run may be given wherever a path to one may."""
        return str(self.folder)


class RunFolder:
    """Reads and writes one run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = as_path("the run folder", path)
        self.checkpoints = path / "checkpoints"
        self.lines = MetricLines(path / "metrics.jsonl")
        self.lock = FolderLock(path)
        self.facts = RunFacts(path)
        self.writer = Writer()
        self._copies = HostCopies()
        # Whether the last save isn't written (rank 0).
        self._behind = False

    @staticmethod
    def claim(recipe: Recipe, options: RunOptions) -> RunFolder:
        """The folder of a run that starts; writes nothing yet. Only rank 0 accesses it.

        Raises:
            UserError: as :meth:`FolderLock.check`.
        """
        folder = RunFolder(run_path(recipe, options))

        def claim() -> RunFolder:
            with writing(folder.path):  # a name that is too long raises OSError
                folder.lock.check(options.resume)
            if options.resume:
                folder._check_continuable()
            return folder

        return first(claim)

    def as_begun(self, options: RunOptions) -> RunOptions:
        """The options with which a resumed run was begun; a new run's are returned unchanged.

        Raises:
            UserError: an option differs from what the run was begun with.
        """
        return first(lambda: self._as_begun(options))

    def _as_begun(self, options: RunOptions) -> RunOptions:
        if not options.resume or not self.facts.environment_file.is_file():
            return options
        if self.facts.recipe_file.is_file():
            self.recipe()  # raises here, before training, if the file is damaged
        begun = options.as_begun(begun_with(self.path, options), self.path)
        for difference in other_teacher(self.path, options.teacher):
            raise UserError(
                f"the run in {self.path} was started differently: it differs in {difference}; leave "
                "--teacher out to resume it as it was, or choose another --out"
            )
        return self.facts.with_data(begun)

    @contextmanager
    def beginning(self, session: Session) -> Iterator[None]:
        """Opens the folder; a new folder is removed if the body raises."""
        made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.open(session)
        try:
            yield
        except BaseException:
            if not session.options.resume and speaks():
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                with suppress(OSError):  # another run may have begun in a parent
                    for place in made:
                        place.rmdir()
            raise

    def open(self, session: Session) -> None:
        """Creates the folder, or loads the newest checkpoint into the session.

        A run that was killed before its first checkpoint starts again.

        Raises:
            UserError: another process uses the folder.
        """
        found = session.learner.ranks.first(lambda: self._open(session))
        if found is None:
            return
        session.load_state(*found)
        session.learner.ranks.first(lambda: self._note_changes(session))
        # An unfinished epoch's row will be written again, unless no step is left.
        rows = [
            row
            for row in self.metrics()
            if row["epoch"] < session.epoch or (session.stopped and row["step"] <= session.step)
        ]
        session.learner.ranks.first(lambda: self._replace_lines(rows))
        # The best checkpoint's score by this version's measure.
        kept = session.learner.ranks.first(lambda: list_checkpoints(self.checkpoints, "best"))
        scores = [
            _score(row, session.recipe)
            for row in rows
            if kept and row.get("step") == checkpoint_step(kept[0])
        ]
        session.best = next((score for score in scores if score is not None), session.best)

    def _open(self, session: Session) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Locks and prepares the folder; returns the newest checkpoint of a resumed run."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock.take()
        if not session.options.resume:
            # Another run may have used the folder since the first check.
            self.lock.check(resume=False)
            for name in ("tuning.json", DATA):  # of a run that ended before a step
                (self.path / name).unlink(missing_ok=True)
        with writing(self.path):
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoints)
        if session.options.resume and list_checkpoints(self.checkpoints):
            _, tensors, facts, _ = newest_checkpoint(self.checkpoints)
            if continues(session.recipe, facts):
                facts["recipe"] = session.recipe.to_json()
            return tensors, facts
        if session.options.resume and self.facts.recipe_file.is_file():
            begun = self.recipe().to_json()
            if not continues(session.recipe, {"recipe": begun}):
                check_recipe(session.recipe, begun)
            self._start_again()
        with writing(self.path):
            self.facts.write_recipe(session.recipe)
            self.facts.write_data(session.data)
            self._write_environment(session)
            for kept in to_keep(self.path, session.teachers):
                write_durably(kept.path, kept.to_bytes())
            if session.taught_NC is not None:
                write_taught(self.path, session.taught_NC, session.teachers, session.data)
        return None

    def _note_changes(self, session: Session) -> None:
        """Writes what a resumed run may change: the number of epochs, and where its data are."""
        with writing(self.path):
            if self.facts.recipe_file.is_file() and self.recipe() != session.recipe:
                self.facts.write_recipe(session.recipe)
            self.facts.move_data(_data_root(session))

    def _check_continuable(self) -> None:
        """Raises UserError for a run that has ended and whose checkpoints were removed."""
        if (self.path / STUDENT).is_file() and not list_checkpoints(self.checkpoints):
            raise UserError(
                f"{self.path} holds a student and no checkpoint to continue from, as `fastokd clean "
                "--checkpoints` leaves a run: put its checkpoints/ back, or choose another --out"
            )

    def _start_again(self) -> None:
        """Removes the metric lines of a run without checkpoints."""
        self._check_continuable()
        if self.lines.path.is_file():
            self._replace_lines([])

    def _replace_lines(self, rows: list[dict[str, Any]]) -> None:
        with writing(self.path):
            self.lines.replace(rows)

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and releases the lock."""
        try:
            self.writer.join()
        finally:
            self.lock.release()

    def settled(self, session: Session, timings: list[Timing]) -> None:
        """Writes the chosen engine and the timings."""

        def keep() -> None:
            with writing(self.path):
                self.facts.write_tuning(timings)
                self._write_environment(session)

        session.learner.ranks.first(keep)

    def changed(self, session: Session) -> None:
        """Writes how the session's steps run from now on."""
        with writing(self.path):
            self._write_environment(session)

    def _write_environment(self, session: Session) -> None:
        learner = session.learner
        self.facts.write_environment(
            learner.device,
            learner.precision,
            {**session.how(), "data_root": _data_root(session)},
            resumed=session.options.resume,
        )

    def recipe(self) -> Recipe:
        """The run's resolved recipe; raises as :meth:`RunFacts.recipe`."""
        return self.facts.recipe()

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far; raises as :meth:`MetricLines.read`."""
        return self.lines.read()

    def record(self, session: Session, row: dict[str, Any]) -> None:
        """Writes an epoch's line and checkpoint in the background, and the best checkpoint if its score
        is the best.

        The score is on held-out images if the recipe has some, else on the test set. Only whole epochs
        count, so that an interrupted run keeps the same best checkpoint.
        """
        self.save(session, row=row, background=True)

    def save(
        self, session: Session, *, row: dict[str, Any] | None = None, background: bool = False
    ) -> None:
        """Copies the session's state, and writes it as a checkpoint: with the line ``row``, and also as
        the best one if ``row`` has the best score.

        All ranks call this together; the copies are written by a thread of rank 0. The checkpoint
        before this one is waited for. Metric lines are written before the checkpoint, since a resumed
        run doesn't train their epochs again.

        Args:
            background: returns when the copies are queued. If the write fails, its thread warns.

        Raises:
            DiskError: it can't be written; files written before are intact. Not in the background.
        """
        ranks = session.learner.ranks
        ranks.first(self.writer.wait)
        score = None if row is None or session.batch else _score(row, session.recipe)
        before = session.best
        better = score is not None and (before is None or score > before)
        if better:
            session.best = score
        tensors, facts = session.state()
        if row is not None:
            facts["best_on"] = choosing_split([row])
        last, best = (self.checkpoints / f"{kind}-{session.step:09d}" for kind in ("last", "best"))

        def write() -> None:
            try:
                with writing(self.path):
                    copied()
                    self._write(last, best if better else None, copies, facts)
            except Exception as error:
                if better and not best.is_dir():
                    session.best = before  # the best that is on disk
                if not background:
                    raise
                warn(f"{in_one_line(error)}; training continues until the next save")
            else:
                self._behind = False

        if speaks():
            if row is not None:
                self.lines.add(row)
            copies, copied = self._copies.take(tensors)
            self._behind = True
            self.writer.start(write)
        if not background:
            ranks.first(self.writer.wait)

    def _write(
        self, last: Path, best: Path | None, tensors: dict[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Writes the waiting lines and the checkpoint ``last``, which is also ``best`` if that is given."""
        self.lines.write()
        # The best one first, so that a run killed in between repeats the epoch.
        if best is not None:
            save_checkpoint(best, tensors, facts)
            prune_checkpoints(self.checkpoints, "best", 1)
            link_checkpoint(best, last)
        else:
            save_checkpoint(last, tensors, facts)
        prune_checkpoints(self.checkpoints, "last", 2)

    @contextmanager
    def keeping(self, session: Session, save: Callable[[], None]) -> Iterator[None]:
        """Saves a checkpoint of the last step if a data file or the loader stops the run."""
        try:
            yield
        except (DataFileError, LoaderError):
            if session.learner.ranks.size == 1:  # other ranks wait within the failed step
                try:
                    save()
                except DiskError as error:
                    warn(str(error))
            raise

    def finish(self, session: Session) -> Run:
        """Writes the student with its published keys and checks it (:func:`check_kept`).

        Raises:
            DiskError: the student or the last steps can't be saved.
            UserError: its logits differ from those in the cohort. It and the checkpoints are kept.
        """
        session.learner.ranks.first(self.writer.wait)
        if session.learner.ranks.first(lambda: self._behind):
            self.save(session)
        tensors, facts = session.state()
        session.learner.ranks.first(lambda: self._write_student(session, tensors, facts))
        average = session.learner.average
        if average is not None and session.recipe.keep == "average":
            text = average.warning(self.metrics())
            if text and speaks():
                warn(text)
        kept = student_of(self.path, tensors, facts, [])
        check_kept(session.learner, session.data, kept, self.path)
        return Run(self.path, session.recipe, self.metrics())

    def _write_student(
        self, session: Session, tensors: dict[str, Tensor], facts: dict[str, Any]
    ) -> None:
        student = student_of(self.path, tensors, facts, run_rows(self.path))
        member = session.learner.cohort.students[session.recipe.kept_student]
        assert isinstance(member, Student)
        plain = {member.published_key(key): value for key, value in student.state.items()}
        with writing(self.path):
            write_durably(self.path / STUDENT, Weights(self.path, plain, student.facts).to_bytes())


def _data_root(session: Session) -> str | None:
    """The absolute path of the run's data. The digits have none: scikit-learn has them."""
    root = session.options.data_root or place_of(session.recipe.dataset)[1] or None
    return None if root is None or session.recipe.dataset == "digits" else os.path.abspath(root)


def _score(row: dict[str, Any], recipe: Recipe) -> float | None:
    measured = row.get(choosing_split([row]))
    return None if measured is None else recipe.score(measured)
