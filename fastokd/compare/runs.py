"""Trains the runs of a comparison, and measures them."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastokd.checkpoint import read_object, write_durably
from fastokd.compare.wanted import Entry
from fastokd.data import DatasetSplits
from fastokd.device import pick_device, release_memory
from fastokd.errors import DeviceLostError, DiskError, UserError, forget, in_one_line
from fastokd.host.names import on_a_line
from fastokd.host.streams import say, warn
from fastokd.measured.answering import answers_of
from fastokd.measured.answers import Calibration
from fastokd.recipe.names import Recipe
from fastokd.run.folder import Run
from fastokd.run.identity import is_done, refuse_another
from fastokd.run.options import RunOptions
from fastokd.run.sweep import INDEX, Train, run_all

# The peak of a GPU's memory while a run trained, beside the run's own files.
MEMORY = "memory.json"


@dataclass(frozen=True)
class Outcome:
    """A run's results on the test images after its last epoch.

    Attributes:
        kept, mean, ensemble: top-1 in %, of the student that the run keeps, the mean over its students,
            and the mean of the peers' probabilities; the last two are None for one student.
        diversity: the mean distance between the peers' predictions; None for one peer.
        seconds: of training, without evaluations.
        memory: the measured peak of a GPU's memory in bytes; None if it wasn't measured.
    """

    entry: Entry
    run: Run
    calibration: Calibration
    kept: float
    mean: float | None
    ensemble: float | None
    diversity: float | None
    seconds: float
    memory: int | None

    @property
    def ece(self) -> float:
        """The kept student's expected calibration error in %."""
        return 100 * self.calibration.ece


@dataclass(frozen=True)
class Failure:
    """A run that couldn't be trained or measured, and why."""

    entry: Entry
    why: str
    traceback: str


def check_folder(
    out: Path, wanted: Sequence[Entry], options: Callable[[Entry], RunOptions]
) -> None:
    """Raises UserError if ``out`` is of something else, or a run in it has another recipe or other options."""
    if out.exists() and not (out / INDEX).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no comparison's folder: choose another --out")
    for entry in wanted:
        folder = out / entry.run.folder
        if (folder / "recipe.json").is_file():
            its = options(entry)
            # A teacher that is still missing, or that is trained again, is compared when it is there.
            named = all(Path(name).exists() for name in its.teacher)
            refuse_another(
                folder, entry.run.recipe, its if named else dataclasses.replace(its, teacher=())
            )


def state_of(out: Path, entry: Entry) -> str:
    """``"done"``, ``"begun"`` or ``"missing"``."""
    folder = out / entry.run.folder
    if not (folder / "recipe.json").is_file():
        return "missing"
    return "done" if is_done(folder, entry.run.recipe, None) else "begun"


def run_everything(
    out: Path,
    wanted: Sequence[Entry],
    options: Callable[[Entry], RunOptions],
    data: DatasetSplits,
    train: Train,
) -> tuple[list[Outcome], list[Failure]]:
    """Trains the missing runs, resumes the interrupted ones and measures all. A run that fails is reported,
    and the others go on.

    Raises:
        DiskError, DeviceLostError: no further run could be trained.
    """
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    for number, entry in enumerate(wanted, 1):
        its = options(entry)
        if not its.quiet:
            say(f"run {number} of {len(wanted)}: {on_a_line(entry.run.folder)}")
        try:
            outcomes.append(_run(out, entry, its, data, train))
        except (DiskError, DeviceLostError):
            raise
        except Exception as error:  # of one method or of too little memory
            why = in_one_line(error)
            failures.append(Failure(entry, why, traceback.format_exc()))
            warn(f"the run {on_a_line(entry.run.folder)} failed and is left out: {why}")
            forget(error)
            release_memory(pick_device(its.device))
    return outcomes, failures


def _run(
    out: Path, entry: Entry, options: RunOptions, data: DatasetSplits, train: Train
) -> Outcome:
    def measured(recipe: Recipe, options: RunOptions) -> Run:
        device = pick_device(options.device)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        run = train(recipe, options)
        if on_gpu:
            facts = {"peak_bytes": torch.cuda.max_memory_allocated(device)}
            write_durably(run.folder / MEMORY, (json.dumps(facts) + "\n").encode())
        return run

    (run,) = run_all(out, [entry.run], options, measured)
    answers = answers_of(run, data, options)
    test = next(row for row in reversed(run.metrics) if "test" in row)["test"]
    several, peak = run.recipe.students > 1, read_object(run.folder / MEMORY, "peak of memory")
    return Outcome(
        entry,
        run,
        answers.calibration(answers.kept),
        kept=100 * answers.accuracy(answers.kept),
        mean=100 * test["mean_top1"] if several else None,
        ensemble=100 * test["ensemble_top1"] if several else None,
        diversity=test["diversity"],
        seconds=run.seconds,
        memory=peak.get("peak_bytes"),
    )


def outcome_json(one: Outcome) -> dict[str, Any]:
    """For comparison.json."""
    return {
        **entry_json(one.entry),
        "kept_top1": one.kept,
        "mean_top1": one.mean,
        "ensemble_top1": one.ensemble,
        "diversity": one.diversity,
        "ece": one.ece,
        "calibration": dataclasses.asdict(one.calibration),
        "seconds": one.seconds,
        "memory_bytes": one.memory,
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    """A run's place in the comparison and its cost."""
    return {
        "row": entry.contestant.label,
        "condition": entry.condition.title,
        "seed": entry.seed,
        "folder": entry.run.folder,
        "recipe": entry.run.recipe.name,
        "epochs": entry.run.recipe.epochs,
        "images": entry.images,
        "macs": entry.macs,
    }
