"""Several runs of one purpose: a folder each, an index, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe
from fastokd.recipe.settings import WantedRun
from fastokd.run.folder import Run, RunFolder
from fastokd.run.identity import is_done, refuse_another
from fastokd.run.lock import alone_in
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise

INDEX = "index.json"
# :func:`fastokd.train`, which lies above this room.
Train = Callable[[Recipe, RunOptions], Run]


def sweep_folder(name: str) -> Path:
    """Where the runs of a recipe lie that have no ``--out``."""
    return Path("runs") / f"{name.replace('/', '-')}-sweep"


def run_all(out: Path, wanted: Sequence[WantedRun], options: RunOptions, train: Train) -> list[Run]:
    """Trains what isn't trained, goes on with what was interrupted, keeps ``index.json``.

    Raises:
        UserError: ``out`` exists and is no such folder; a run in it has another recipe or other
            options; another process is at work in it; whatever :func:`fastokd.train` raises.
    """
    index = _Index(out)
    for entry in wanted:
        index.want(entry, anew=False)
    runs = []
    for entry in wanted:

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
    """``index.json``: every run of the folder, in the order in which they were asked for.

    Several sweeps may write it: each reads it again, under a lock, before it adds to it.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / INDEX
        self.mine: set[str] = set()
        self.made: list[Path] = []  # folders that weren't there, the innermost first
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
        """Where the first run can't even begin, the folder is as if nobody had asked for it."""
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
        """Writes down that a run is wanted; ``anew``: whatever was written of it before."""
        self.mine.add(entry.folder)
        self._write(entry, {"state": "wanted"}, over=anew)

    def note(self, entry: WantedRun, run: Run) -> None:
        """Writes down how a run ended: ``"done"``, or ``"cut"`` before the last of its epochs."""
        state = "done" if run.is_whole else "cut"
        self._write(entry, {"state": state, **dataclasses.asdict(summarise(run))}, over=True)

    def _write(self, entry: WantedRun, facts: dict[str, Any], *, over: bool) -> None:
        row = {
            "folder": entry.folder,
            "recipe": entry.recipe.name,
            "settings": dict(entry.settings),
            **facts,
        }
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
    """The run in ``options.out``: as it lies there if it is done, else trained to its end.

    A run that was stopped before its first checkpoint is started again. Nothing is written or
    removed before the folder is locked.

    Raises:
        UserError: the folder holds a run of another recipe or of other options; another process is
            at work in it.
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
                f"{folder.path} holds a run that isn't done and has no checkpoints/ to go on from: "
                "put them back, or choose another --out"
            )
    return train(wanted, dataclasses.replace(options, resume=begun))
