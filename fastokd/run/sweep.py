"""A sweep: several runs, each in its own folder, with an index; it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.host.names import on_a_line
from fastokd.host.streams import say
from fastokd.recipe.names import Recipe
from fastokd.recipe.settings import WantedRun
from fastokd.run.folder import Run, RunFolder
from fastokd.run.identity import is_done, refuse_another
from fastokd.run.lock import alone_in
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise

INDEX = "index.json"
# The type of :func:`fastokd.train`, which this room can't import.
Train = Callable[[Recipe, RunOptions], Run]


def sweep_folder(name: str) -> Path:
    """The default folder of a recipe's sweep."""
    return Path("runs") / f"{name.replace('/', '-')}-sweep"


def run_all(out: Path, wanted: Sequence[WantedRun], options: RunOptions, train: Train) -> list[Run]:
    """Trains the missing runs, resumes the interrupted ones, and keeps ``index.json``.

    Raises:
        UserError: ``out`` exists and is no sweep's folder; a run in it has another recipe or other
            options; another process uses it; errors of :func:`fastokd.train`.
    """
    index = _Index(out)
    for entry in wanted:
        index.want(entry, anew=False)
    runs = []
    for number, entry in enumerate(wanted, 1):
        if len(wanted) > 1 and not options.quiet:
            say(f"run {number} of {len(wanted)}: {on_a_line(entry.folder)}")

        def begin(recipe: Recipe, options: RunOptions, entry: WantedRun = entry) -> Run:
            index.want(entry, anew=True)
            return train(recipe, options)

        with index.kept_if_begun():
            to = dataclasses.replace(options, out=out / entry.folder)
            run = run_or_resume(entry.recipe, to, begin)
        index.note(entry, run)
        runs.append(run)
    return runs


class _Index:
    """``index.json``: every run of the folder, in the order of the requests.

    Several sweeps may write it: each update locks the folder and reads the file again.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / INDEX
        self.mine: set[str] = set()
        self.made: list[Path] = []  # folders that this sweep created, the innermost first
        if not self.path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and holds no {INDEX}: choose another --out")
        self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return {entry["folder"]: entry for entry in json.loads(self.path.read_text())}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path} can't be read ({error}): choose another --out") from error

    @contextmanager
    def kept_if_begun(self) -> Iterator[None]:
        """Removes the index and the created folders if the first run can't begin."""
        try:
            yield
        except UserError:
            folder = self.path.parent
            if self.made:
                with alone_in(folder):
                    alone = [path.name for path in folder.iterdir()] == [INDEX]
                    if alone and self._read().keys() <= self.mine:
                        self.path.unlink()
                        for made in self.made:
                            made.rmdir()
            raise

    def want(self, entry: WantedRun, *, anew: bool) -> None:
        """Records that a run is wanted; ``anew``: even if it is recorded already."""
        self.mine.add(entry.folder)
        self._write(entry, {"state": "wanted"}, over=anew)

    def note(self, entry: WantedRun, run: Run) -> None:
        """Records how a run ended: ``"done"``, or ``"cut"`` before its last epoch."""
        state = "done" if run.is_whole else "cut"
        self._write(entry, {"state": state, **dataclasses.asdict(summarise(run))}, over=True)

    def _write(self, entry: WantedRun, facts: dict[str, Any], *, over: bool) -> None:
        known = {"folder": entry.folder, "recipe": entry.recipe.name}
        row = {**known, "settings": dict(entry.settings), **facts}
        folder = self.path.parent
        try:
            if not folder.exists():
                self.made = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
            with alone_in(folder):
                entries = self._read()
                if entry.folder not in entries or (over and entries[entry.folder] != row):
                    entries[entry.folder] = row
                    text = json.dumps(list(entries.values()), indent=1) + "\n"
                    write_durably(self.path, text.encode())
        except OSError as error:
            raise UserError(f"{folder} can't be written ({error}): choose another --out") from error


def run_or_resume(wanted: Recipe, options: RunOptions, train: Train) -> Run:
    """The run in ``options.out``, which is trained or resumed unless it is done.

    A run that was stopped before its first checkpoint starts again. Nothing is written or removed
    before the folder is locked.

    Raises:
        UserError: the folder holds a run of another recipe or of other options; another process is
            using it.
    """
    assert options.out is not None
    folder = RunFolder(options.out)
    begun = folder.facts.recipe_file.is_file()
    if begun:
        refuse_another(folder.path, wanted, options)
        if is_done(folder.path, wanted, options.max_steps):
            return Run.load(folder.path)
        if not folder.checkpoints.is_dir():
            raise UserError(
                f"{folder.path} holds a run that isn't done and has no checkpoints/ to continue from: "
                "put them back, or choose another --out"
            )
    return train(wanted, dataclasses.replace(options, resume=begun))
