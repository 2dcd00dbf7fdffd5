"""A comparison from the request to its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastokd.compare import results
from fastokd.compare.charts import charts_of
from fastokd.compare.contestants import Contestant, Request, contestants
from fastokd.compare.cost import counted_peak
from fastokd.compare.every import every_run
from fastokd.compare.figures import figures_of
from fastokd.compare.page import comparison_page, write_files
from fastokd.compare.runs import Failure, check_folder, entry_json, run_everything, state_of
from fastokd.compare.shared import own_settings, settings_of
from fastokd.compare.tables import tables_of
from fastokd.compare.verdict import verdicts
from fastokd.compare.wanted import Entry, entries
from fastokd.data import DatasetSplits
from fastokd.errors import UserError
from fastokd.host.names import counted
from fastokd.measured.answers import BINS
from fastokd.recipe.names import recipe
from fastokd.report.plots import as_svg, in_page
from fastokd.report.tables import Table
from fastokd.run.facts import RunFacts
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions
from fastokd.run.sweep import Train


@dataclass(frozen=True)
class Prepared:
    """A comparison that was checked and counted; nothing is trained yet."""

    request: Request
    out: Path
    options: RunOptions
    data: DatasetSplits
    rows: tuple[Contestant, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def options_of(self, entry: Entry) -> RunOptions:
        """The options of one run."""
        return entry.options(self.options, self.out, self.rows[0].recipe)

    def to_json(self) -> dict[str, Any]:
        """The runs that are wanted, what each costs, and which are done, for ``--dry-run``."""
        runs = [{**entry_json(one), "state": state_of(self.out, one)} for one in self.entries]
        left = [run for run in runs if run["state"] != "done"]
        sums = {f"{what}_left": sum(run[what] for run in left) for what in ("images", "macs")}
        return {"out": str(self.out), "runs": runs, **sums, "notes": list(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """A comparison's results."""

    title: str
    rules: tuple[str, ...]
    tables: tuple[Table, ...]
    failures: tuple[Failure, ...]
    sections: tuple[results.Section, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What ``comparison.json`` holds."""
        return {"title": self.title, "rules": list(self.rules), **self.facts}


def prepare(request: Request, out: Path, options: RunOptions) -> Prepared:
    """Checks a comparison before anything is trained, and lists its runs.

    Raises:
        UserError: what :func:`contestants` and :func:`entries` refuse; data that can't be read; ``out`` is of
            something else, or of a comparison with other settings.
    """
    named = f"baseline/{request.model}/{request.dataset}"
    fields = recipe(named).to_json().keys()
    own = own_settings(request.recipe, request.settings)
    base = recipe(named, **{k: v for k, v in own.items() if k in fields})
    base = replace(base, **settings_of(request.recipe, request.settings))
    # Each run learns from its own teacher; the others take none.
    request = replace(request, teacher=options.teacher)
    data = load_splits(base, options)
    rows, notes = contestants(request, data)
    wanted = entries(request, rows, data)
    made = Prepared(request, out, options, data, tuple(rows), tuple(wanted), tuple(notes))
    check_folder(out, wanted, made.options_of)
    return made


def compare(made: Prepared, train: Train) -> Comparison:
    """Trains the runs that ``made.out`` lacks, and writes the comparison there. It can be resumed.

    Raises:
        UserError: every run failed.
        DiskError, DeviceLostError: no further run could be trained.
    """
    outcomes, failures = run_everything(made.out, made.entries, made.options_of, made.data, train)
    if not outcomes:
        raise UserError(f"every run failed, the first with: {failures[0].why}")
    found = results.sections(made.rows, outcomes)
    peaks = {}
    if all(one.memory is None for one in outcomes):
        peaks = {row.label: counted_peak(row.recipe, made.options) for row in made.rows}
    environment = RunFacts(outcomes[0].run.folder).environment()
    request, base = made.request, made.rows[0].recipe
    title = (
        f"{counted(sum(row.kind == 'method' for row in made.rows), 'method')} with {request.model} on "
        f"{request.dataset}, {counted(base.epochs, 'epoch')}, {counted(len(request.seeds), 'seed')}"
    )
    rules = rules_of(made, failures, measured=not peaks)
    tables = tables_of(found, made.rows, failures, peaks, made.notes)
    said, every = verdicts(found), every_run(found)
    drawn = every.draw()
    parallel = "" if drawn is None else in_page(as_svg(drawn))
    charts = charts_of(found, figures_of(found))
    page = comparison_page(title, said, rules, tables, charts, every, parallel, environment)
    facts = {
        "verdicts": said,
        "environment": environment,
        "notes": list(made.notes),
        "memory_counted": peaks,
        **results.to_json(found, made.rows, failures),
    }
    done = Comparison(title, tuple(rules), tuple(tables), tuple(failures), tuple(found), facts)
    written = [*tables, every.table]
    write_files(made.out, title, [*said, *rules], written, page, done.to_json())
    return done


def rules_of(made: Prepared, failures: Sequence[Failure], *, measured: bool) -> list[str]:
    """How the comparison was made, in sentences."""
    request, rows = made.request, made.rows
    seeds = request.seeds
    methods = [row for row in rows if row.kind == "method"]
    kinds = {row.kind for row in rows}
    if request.published:
        same = (
            "Same for every row: students, data, preprocessing and epochs. Optimizer, schedule, batch and "
            "augmentation are each method's published ones"
        )
    else:
        whose = "the data set's recipe for one student"
        same = (
            "Same for every row: students, data, preprocessing, epochs, batch, optimizer, schedule and "
            f"augmentation, those of {whose if request.recipe is None else request.recipe}"
        )
    said = [
        f"{same}. The last table lists what else differs. Nothing was tuned here.",
        f"Each row has the seeds {', '.join(map(str, seeds))}. A seed decides on initial weights, the "
        "order of the images and their augmentation, and is the pair of the tests.",
        "The student that counts is the one that the run keeps (student.safetensors), measured after the "
        "last epoch on all test images. No epoch and no student is chosen by its test accuracy.",
        "Mean ± standard deviation over seeds; intervals are 95% of Student's t. A difference is of pairs with "
        f"one seed; p is of the two-sided paired t test, by Holm's correction for {counted(len(methods), 'method')} "
        "in each column of each table; the result calls a method better or worse where p is below 0.05. "
        "With fewer than two seeds intervals and p are unknown.",
        f"ECE: expected calibration error of the kept student in {BINS} equal bins of confidence. Diversity: "
        "mean distance between two peers' predicted distributions.",
        "MACs: multiply-accumulates of convolutions and linear layers in training; a trained layer counts three "
        "times a forward, a network without gradient (a teacher) once. The training of a teacher has a row "
        "of its own and isn't added to its students' cost.",
    ]
    if request.budget == "macs":
        said.append(
            "Same multiply-accumulates: each method is compared with one student that trains for as many "
            "epochs as cost the same (its schedule scaled)"
            + (
                "; and all with one larger student of the registry that trains for the same epochs: "
                + next(row.label for row in rows if row.kind == "larger")
                if "larger" in kinds
                else ""
            )
            + "."
        )
    if "teacher" in kinds:
        said.append(
            f"A teacher is trained once, with the settings of the row one student and seed {rows[0].recipe.seed}; under "
            "label noise and few images once for each seed, on its students' images and labels."
        )
    elif made.options.teacher:
        said.append(f"The teacher was given: {' '.join(made.options.teacher)}.")
    if request.label_noise:
        said.append(
            "Label noise: that share of the training images has another class as label, drawn uniformly by "
            "the seed; the same images and labels for all rows of a seed, a smaller share within a larger."
        )
    if request.fraction:
        said.append(
            "Few images: that share of each class, drawn by the seed, at least one image; epochs are added "
            "until as many images are seen. Where a batch has more images than there are, it has all of them, and "
            "the learning rate is scaled in proportion."
        )
    memory = (
        "measured of the device's allocations"
        if measured
        else "counted for one step (fastokd plan)"
    )
    said.append(
        f"Seconds are of training on this machine, without evaluations; the peak of memory is {memory}."
    )
    if failures:
        said.append(
            f"{counted(len(failures), 'run')} failed and are left out; the last table says why."
        )
    return said
