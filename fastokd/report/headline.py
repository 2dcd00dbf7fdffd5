"""The first lines of a report: the result, what it is compared with, its speed and its cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from fastokd.errors import UserError, in_one_line
from fastokd.host.names import counted, in_html, in_prefix
from fastokd.models.info import counts
from fastokd.report.find import find_beside
from fastokd.report.pools import Pool, numbers_of, pool_runs
from fastokd.report.results import baseline_of
from fastokd.report.statistics import interval_of, welch, wilson
from fastokd.report.tables import Column, Table, Written
from fastokd.run.durations import in_words
from fastokd.run.facts import RunFacts
from fastokd.run.summary import summarise
from fastokd.student.weights import STUDENT, from_file

NOT_KNOWN = "not known"
AT_A_GLANCE = (
    "Accuracy after the last epoch, in brackets its 95% interval: over seeds by Student's t, of a single run "
    "Wilson's over the test images, if their number is known. Difference in points, with Welch's interval. Speed and time are "
    "measured (median of epochs, sum over epochs); parameters and MACs are counted."
)


@dataclass(frozen=True)
class Fact:
    """A number of the headline: its name, its value, and how it was got."""

    name: str
    value: str
    how: str = ""
    number: float | None = None  # by which a table sorts it, where its text doesn't begin with it


def facts_of(pool: Pool, pools: Sequence[Pool], test_images: int | None) -> list[Fact]:
    """The headline of a pool, the result first.

    Args:
        pools: all pools of the page: the baseline is looked for among them, then beside the run.
        test_images: for the interval of a single run; None if their number isn't known.
    """
    return [
        _accuracy(pool, test_images),
        _difference(pool, pools),
        _state(pool),
        _speed(pool),
        _time(pool),
        _size(pool),
        _machine(pool),
    ]


def as_facts(facts: Sequence[Fact]) -> str:
    """The facts as a list of definitions; the first is the largest."""
    parts = (
        f"<div><dt>{in_html(fact.name)}</dt><dd>{in_html(fact.value)}"
        f"{f'<small>{in_html(fact.how)}</small>' if fact.how else ''}</dd></div>"
        for fact in facts
    )
    return f'<dl class="facts">{"".join(parts)}</dl>'


def headline_table(pools: Sequence[Pool], found: Sequence[Sequence[Fact]]) -> Table:
    """The headlines of several pools, one a row, without the machine."""
    heads = ["test top-1", *(fact.name for fact in found[0][1:-1])]
    rows = tuple(
        (pool.label, *(_written(fact) for fact in facts[:-1]))
        for pool, facts in zip(pools, found, strict=True)
    )
    columns = (Column("recipe", text=True), *(Column(head, text=head == "state") for head in heads))
    numbers = numbers_of(pools)
    return Table("headline", "The runs at a glance", columns, rows, (AT_A_GLANCE,), runs=numbers)


def _written(fact: Fact) -> str | Written:
    return fact.value if fact.number is None else Written(fact.value, fact.number)


def _accuracy(pool: Pool, test_images: int | None) -> Fact:
    summary = summarise(pool.runs[0])
    sample = pool.last()
    name = f"test top-1, {summary.whose or 'the student'}, epoch {summary.last_epoch}"
    if len(pool.runs) > 1:
        values = [100 * summarise(run).last for run in pool.runs]
        how = f"mean of {len(values)} seeds, 95% interval by Student's t over seeds"
        return Fact(name, _within(sample.mean, interval_of(values)), how)
    if test_images is None:
        return Fact(
            name,
            f"{sample.mean:.2f}%",
            "no interval: a single run, number of test images not known",
        )
    low, high = wilson(summary.last, test_images)
    alike = " as of one network" if summary.reported.endswith("mean") else ""
    how = f"Wilson's 95% interval{alike} over {counted(test_images, 'test image')}, one run"
    return Fact(name, _within(sample.mean, (100 * low, 100 * high)), how)


def _within(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{value:.2f}%"
    low, high = max(0.0, interval[0]), min(100.0, interval[1])
    return f"{value:.2f}% [{low:.2f}, {high:.2f}]"


def _difference(pool: Pool, pools: Sequence[Pool]) -> Fact:
    name = "difference from the baseline"
    if pool.recipe.method == "baseline":
        return Fact(name, "none", "this is a student trained alone")
    baseline = baseline_of(pool, pools)
    where = "among these runs"
    if baseline is None and len(pools) == 1:
        where = "beside this run"
        try:
            found = find_beside(pool.runs[0], "baseline")
            alike = [run for run in found if baseline_of(pool, pool_runs([run]))]
            baseline = baseline_of(pool, pool_runs(alike))
        except (UserError, OSError) as error:
            return Fact(
                name, "none", f"the runs beside this one can't be compared: {in_one_line(error)}"
            )
    if baseline is None:
        beside = " or beside them" if len(pools) == 1 else ""
        return Fact(
            name,
            "none",
            f"no run of the same student alone, of the same data and {counted(pool.epochs, 'epoch')}, is "
            f"among these runs{beside}",
        )
    difference = welch(pool.last(), baseline.last())
    by = "no interval: one of the two has a single run"
    if difference.interval is not None:
        by = "Welch's 95% interval over seeds"
    how = f"points; {baseline.label} ({baseline.last()}%, {counted(len(baseline.runs), 'run')}) {where}; {by}"
    return Fact(name, str(difference), how)


def _state(pool: Pool) -> Fact:
    epochs = pool.recipe.epochs
    whole = pool.epochs >= epochs
    value = f"finished, {counted(epochs, 'epoch')}" if whole else f"epoch {pool.epochs} of {epochs}"
    for run in pool.runs:
        bad = [row["epoch"] + 1 for row in run.metrics if not math.isfinite(row["train"]["loss"])]
        if bad:
            value += (
                f"; the loss isn't finite in {counted(len(bad), 'epoch')}, first in epoch {bad[0]}"
            )
            break
    return Fact("state", value, _date(pool))


def _date(pool: Pool) -> str:
    """When the last line of metrics was written."""
    times = []
    for run in pool.runs:
        with suppress(OSError):
            times.append((run.folder / "metrics.jsonl").stat().st_mtime)
    if not times:
        return ""
    last = datetime.fromtimestamp(max(times), timezone.utc)
    return f"metrics.jsonl last written {last:%Y-%m-%d %H:%M} UTC"


def _speed(pool: Pool) -> Fact:
    rates = [row.get("images_per_second") for run in pool.runs for row in run.metrics]
    known = [rate for rate in rates if rate]
    if not known:
        return Fact("training speed", NOT_KNOWN)
    how = f"{_measured(pool)}, median of {counted(len(known), 'epoch')}"
    return Fact("training speed", f"{statistics.median(known):,.1f} images/s", how)


def _time(pool: Pool) -> Fact:
    each = [run.seconds for run in pool.runs]
    mean = statistics.mean(each)
    of = f", mean of {len(each)} runs" if len(each) > 1 else ""
    exact = f"{mean:,.1f} s, {_measured(pool)}, the sum over epochs{of}"
    return Fact("training time", in_words(mean), exact, mean)


def _size(pool: Pool) -> Fact:
    try:
        weights = from_file(pool.runs[0].folder / STUDENT)
        size = weights.preprocessing.input_size
        classes = len(weights.fact("class_names"))
        parameters, macs = counts(weights.model, classes, weights.options, size)
    except UserError:
        return Fact("kept student", NOT_KNOWN, "it isn't written yet")
    value = f"{in_prefix(parameters)} parameters, {in_prefix(macs)} MACs"
    how = f"counted, {weights.model}: {parameters:,} and {macs:,} an image of {size}x{size}"
    return Fact("kept student", value, how, parameters)


def _environments(pool: Pool) -> list[dict[str, Any]]:
    found = []
    for run in pool.runs:
        with suppress(UserError):
            found.append(RunFacts(run.folder).environment())
    return [environment for environment in found if environment]


def _measured(pool: Pool) -> str:
    on_gpu = any(environment.get("gpu") for environment in _environments(pool))
    return "measured-gpu" if on_gpu else "measured-cpu"


def _machine(pool: Pool) -> Fact:
    found = _environments(pool)
    names = dict.fromkeys(str(e.get("gpu") or e.get("cpu")) for e in found)
    if not found:
        return Fact("machine", NOT_KNOWN)
    first = found[0]
    parts = [
        None if first.get("gpu") else counted(first.get("threads") or 1, "thread"),
        first.get("precision"),
        f"engine {first.get('engine')}",
        f"torch {first.get('torch')}",
    ]
    return Fact("machine", ", ".join(names), ", ".join(str(part) for part in parts if part))
