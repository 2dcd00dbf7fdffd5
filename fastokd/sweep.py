"""Several runs of one purpose: a folder each, an index, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastokd.checkpoint import list_checkpoints, write_durably
from fastokd.errors import UserError, unknown_name
from fastokd.methods import option_defaults
from fastokd.recipes import Recipe, recipe
from fastokd.report.summary import summarise
from fastokd.student_file import STUDENT
from fastokd.train import train
from fastokd.training.run_folder import Run, RunFolder
from fastokd.training.session import RunOptions

INDEX = "index.json"


@dataclass(frozen=True)
class Planned:
    """One run that is wanted: its folder's name and its recipe."""

    folder: str
    recipe: Recipe
    settings: Mapping[str, Any]


def parse_settings(texts: Iterable[str]) -> dict[str, list[Any]]:
    """``["lr=0.1,0.05", "mix=logits,probs"]`` as lists of values.

    Values are JSON (numbers, true, ``[10,15]``) or, where one isn't, words.
    """
    settings: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UserError(f"--set is {text!r}: write KEY=VALUE or KEY=VALUE,VALUE")
        if key in settings:
            raise UserError(f"--set names {key} twice: write {key}=VALUE,VALUE")
        try:
            settings[key] = json.loads(f"[{values}]")
        except ValueError:
            settings[key] = values.split(",")
    return settings


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers, each once."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--seeds is {text!r}: write whole numbers, such as 0,1,2")
    return list(dict.fromkeys(int(word) for word in words))


def resolve(name: str, changes: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """The recipe with ``changes``, and ``settings`` of it or of its method.

    Raises:
        UserError: a value of another type than the setting's; an unknown setting.
    """
    base = recipe(name)
    fields = {f.name for f in dataclasses.fields(Recipe)} - {"name", "method_options"}
    of_method = option_defaults(base.method)
    merged: dict[str, Any] = dict(changes)
    options = dict(merged.pop("method_options", {}))
    for key, value in settings.items():
        if key in ("method", "model", "dataset", "sharing"):
            raise UserError(f"--set can't change {key}: a recipe's name says it, name another")
        if key in fields:
            merged[key] = _typed(key, value, getattr(base, key))
        elif key in of_method:
            options[key] = value
        else:
            raise unknown_name("setting", key, [*fields, *of_method])
    if options:
        merged["method_options"] = options
    return recipe(name, **merged)


def _typed(key: str, value: Any, like: Any) -> Any:
    if isinstance(like, tuple) and isinstance(value, list):
        return tuple(value)
    kinds = (int, float) if isinstance(like, float) else (type(like),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(like, bool)):
        raise UserError(f"{key} is {value!r}: it must be {_kind(like)}, like {like!r}")
    return float(value) if isinstance(like, float) else value


def _kind(like: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list"}
    return names.get(type(like), "a word")


def scaled_rate(name: str, lr: float | None, batch_size: int | None) -> float:
    """The rate (``lr``, or the recipe's) times the batch over the recipe's own: Goyal et al.'s rule
    (arXiv 1706.02677), which holds for the recipe's SGD; a method's own Adam keeps its rate."""
    base = recipe(name)
    return (base.lr if lr is None else lr) * (batch_size or base.batch_size) / base.batch_size


def plan(
    name: str,
    changes: Mapping[str, Any],
    settings: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
) -> list[Planned]:
    """Every combination of the settings' values and the seeds."""
    planned = []
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        words = [f"{key}={_word(value)}" for key, value in chosen.items()]
        for seed in seeds:
            resolved = resolve(name, {**changes, "seed": seed}, chosen)
            folder = "-".join([name.replace("/", "-"), *words, f"seed{seed}"])
            planned.append(Planned(folder, resolved, {**chosen, "seed": seed}))
    return planned


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "".join(letter if letter.isalnum() or letter in "._-,+" else "_" for letter in text)


def sweep_folder(name: str) -> Path:
    """Where the runs of a recipe lie that have no ``--out``."""
    return Path("runs") / f"{name.replace('/', '-')}-sweep"


def run_all(out: Path, planned: Sequence[Planned], options: RunOptions) -> list[Run]:
    """Trains what isn't trained, goes on with what was interrupted, keeps ``index.json``.

    Raises:
        UserError: ``out`` exists and is no such folder; a run in it has another recipe; whatever
            :func:`fastokd.train` raises.
    """
    index = _Index(out)
    for entry in planned:
        index.note(entry, None)
    runs = []
    for entry in planned:
        with index.kept_if_begun():
            run = run_or_resume(entry.recipe, dataclasses.replace(options, out=out / entry.folder))
        index.note(entry, run)
        runs.append(run)
    return runs


class _Index:
    """``index.json``: every run of the folder, in the order in which they were asked for."""

    def __init__(self, out: Path) -> None:
        self.path = out / INDEX
        self.entries: dict[str, dict[str, Any]] = {}
        self.made: list[Path] = []  # folders that weren't there, the innermost first
        if self.path.is_file():
            try:
                self.entries = {
                    entry["folder"]: entry for entry in json.loads(self.path.read_text())
                }
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{self.path} can't be read ({error}): choose another --out"
                ) from error
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and holds no {INDEX}: choose another --out")

    @contextmanager
    def kept_if_begun(self) -> Iterator[None]:
        """Where the first run can't even begin, the folder is as if nobody had asked for it."""
        try:
            yield
        except UserError:
            if self.made and [path.name for path in self.path.parent.iterdir()] == [INDEX]:
                self.path.unlink()
                for folder in self.made:
                    folder.rmdir()
            raise

    def note(self, entry: Planned, run: Run | None) -> None:
        """Writes down that a run is wanted, or how it ended."""
        known = self.entries.get(entry.folder)
        if run is None and known is not None:
            return
        row: dict[str, Any] = {
            "folder": entry.folder,
            "recipe": entry.recipe.name,
            "settings": dict(entry.settings),
            "state": "wanted" if run is None else "done",
        }
        if run is not None:
            row |= dataclasses.asdict(summarise(run))
        self.entries[entry.folder] = row
        folder = self.path.parent
        try:
            if not folder.exists():
                self.made = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True)
            write_durably(
                self.path, (json.dumps(list(self.entries.values()), indent=1) + "\n").encode()
            )
        except OSError as error:
            raise UserError(f"{folder} can't be written ({error}): choose another --out") from error


def run_or_resume(wanted: Recipe, options: RunOptions) -> Run:
    """The run in ``options.out``: as it lies there if it is done, else trained to its end.

    A run that was stopped before its first checkpoint is started again.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    out = options.out
    assert out is not None
    folder = RunFolder(out)
    options = dataclasses.replace(options, resume=False)
    if not (out / "recipe.json").is_file():
        return train(wanted, options)
    found = folder.recipe()
    if found != wanted:
        theirs, ours = found.to_json(), wanted.to_json()
        differing = [
            f"{k} ({theirs[k]} there, {ours[k]} wanted)" for k in ours if theirs[k] != ours[k]
        ]
        raise UserError(
            f"{out} holds another run: it differs in {', '.join(differing)}; choose another --out"
        )
    if _is_done(folder, wanted, options):
        return Run.load(out)
    if not list_checkpoints(folder.checkpoints):
        shutil.rmtree(out)
        return train(wanted, options)
    return train(wanted, dataclasses.replace(options, resume=True))


def _is_done(folder: RunFolder, wanted: Recipe, options: RunOptions) -> bool:
    rows = folder.metrics()
    if not rows or not (folder.path / STUDENT).is_file():
        return False
    return rows[-1]["epoch"] + 1 == wanted.epochs or rows[-1]["step"] == options.max_steps
