"""Every run of a comparison, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastokd.compare.results import Section
from fastokd.compare.runs import Outcome
from fastokd.host.names import in_prefix
from fastokd.report.fields import varying
from fastokd.report.many import Many, runs_table
from fastokd.report.statistics import Sample
from fastokd.report.tables import Cell, Column, Written

TOP1 = "test top-1 (%)"
NOTES = (
    "After the last epoch, on the test images: kept and ECE from answers.safetensors, the others from metrics.jsonl. "
    "MACs are counted; seconds are of training on this machine, without evaluations.",
)
# What the row of a run says already.
IMPLIED = ("method", "sharing")


def every_run(found: Sequence[Section]) -> Many:
    """The runs of all conditions in the order of the tables; called by their folders."""
    runs = [one for section in found for row in section.rows for one in row.outcomes]
    settings = varying([one.run for one in runs])
    fields = {
        "row": [one.entry.contestant.label for one in runs],
        **{name: values for name, values in settings.items() if name not in IMPLIED},
    }

    def column(value: Callable[[Outcome], float | None]) -> Sequence[Cell]:
        return [None if (v := value(one)) is None else Sample(v, None, 1) for one in runs]

    results: dict[Column, Sequence[Cell]] = {
        Column("kept", TOP1): column(lambda one: one.kept),
        Column("mean of students", TOP1): column(lambda one: one.mean),
        Column("ensemble", TOP1): column(lambda one: one.ensemble),
        Column("diversity", digits=3): column(lambda one: one.diversity),
        Column("ECE (%)"): column(lambda one: one.ece),
        Column("images"): [one.entry.images for one in runs],
        Column("MACs"): [Written(in_prefix(one.entry.macs), one.entry.macs) for one in runs],
        Column("seconds", digits=1): column(lambda one: one.seconds),
    }
    names = [one.entry.run.folder for one in runs]
    table = runs_table(names, fields, results, NOTES)
    return Many(names, fields, "kept, top-1 (%)", [one.kept for one in runs], table)
