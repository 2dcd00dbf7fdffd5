"""A comparison's tables: at equal images seen, at equal multiply-accumulates, and what differs."""

from __future__ import annotations

from collections.abc import Sequence

from fastokd.compare.contestants import Contestant
from fastokd.compare.results import Against, Row, Section, settings_of
from fastokd.compare.runs import Failure
from fastokd.host.names import in_prefix
from fastokd.report.statistics import Difference
from fastokd.report.tables import Cell, Column, Table, Written

UNKNOWN = "unknown"
RESULTS = (
    Column("row", text=True),
    Column("seeds"),
    Column("kept", group="test top-1 (%)"),
    Column("95% interval", group="test top-1 (%)"),
    Column("mean of students", group="test top-1 (%)"),
    Column("ensemble", group="test top-1 (%)"),
    Column("difference", group="from one student, same images"),
    Column("p (Holm)", group="from one student, same images"),
    Column("diversity", digits=3),
    Column("ECE (%)"),
    Column("epochs", group="a run's cost"),
    Column("images", group="a run's cost"),
    Column("MACs", group="a run's cost"),
    Column("seconds", group="a run's cost", digits=1),
    Column("memory (MB)", group="a run's cost"),
)
EQUAL_MACS = (
    Column("method", text=True),
    Column("kept, top-1 (%)"),
    Column("MACs"),
    Column("the student alone", group="one student, as many MACs", text=True),
    Column("top-1 (%)", group="one student, as many MACs"),
    Column("difference", group="one student, as many MACs"),
    Column("p (Holm)", group="one student, as many MACs"),
    Column("top-1 (%)", group="the larger student"),
    Column("difference", group="the larger student"),
    Column("p (Holm)", group="the larger student"),
)


def tables_of(
    found: Sequence[Section],
    rows: Sequence[Contestant],
    failures: Sequence[Failure],
    memory: dict[str, int | None],
    notes: Sequence[str],
) -> list[Table]:
    """Two tables for each condition, then the settings and the runs that failed.

    ``memory``: of each row the counted peak of a step, for runs whose peak wasn't measured.
    """
    made = []
    for index, section in enumerate(found):
        name = f"-{index}" if index else ""
        title = section.condition.title
        lines = tuple(_result(row, memory) for row in section.rows)
        said = tuple(notes) if index == 0 else ()
        made.append(Table(f"images{name}", f"Same images seen: {title}", RESULTS, lines, said))
        methods = [row for row in section.of("method") if "macs" in row.against]
        if methods:
            lines = tuple(_equal(row, section) for row in methods)
            made.append(
                Table(f"macs{name}", f"Same multiply-accumulates: {title}", EQUAL_MACS, lines)
            )
    words = (Column("row", text=True), Column("setting=value", text=True))
    differing = tuple(settings_of(rows))
    title = "Settings in which a row differs from the student alone"
    made.append(Table("settings", title, words, differing))
    if failures:
        failed: tuple[tuple[Cell, ...], ...] = tuple(
            (one.entry.run.folder, one.why) for one in failures
        )
        columns = (Column("run", text=True), Column("why", text=True))
        made.append(Table("failed", "Runs that failed", columns, failed))
    return [table.without_empty_columns() for table in made]


def _result(row: Row, memory: dict[str, int | None]) -> tuple[Cell, ...]:
    first = row.outcomes[0].entry
    measured = [one.memory for one in row.outcomes if one.memory is not None]
    peak = max(measured) if measured else memory.get(row.contestant.label)
    return (
        row.contestant.label,
        len(row.outcomes),
        row.kept,
        in_brackets(row.interval),
        row.sample(lambda one: one.mean),
        row.sample(lambda one: one.ensemble),
        *_difference(row.against.get("images")),
        row.sample(lambda one: one.diversity),
        row.sample(lambda one: one.ece),
        first.run.recipe.epochs,
        first.images,
        Written(in_prefix(row.macs), row.macs),
        row.sample(lambda one: one.seconds),
        None if peak is None else round(peak / 1e6),
    )


def _equal(row: Row, section: Section) -> tuple[Cell, ...]:
    by_label = {one.contestant.label: one for one in section.rows}
    equal, larger = row.against["macs"], row.against.get("larger")
    return (
        row.contestant.label,
        row.kept,
        Written(in_prefix(row.macs), row.macs),
        equal.other,
        by_label[equal.other].kept,
        *_difference(equal),
        None if larger is None else by_label[larger.other].kept,
        *_difference(larger),
    )


def _difference(against: Against | None) -> tuple[Difference | None, Cell]:
    if against is None:
        return None, None
    return against.paired.difference, in_p(against)


def in_p(against: Against) -> Written | str | None:
    """The corrected p of a difference; None where it isn't tested."""
    if against.p is None:
        return UNKNOWN if against.paired.p is None else None
    return Written("<0.0001" if against.p < 1e-4 else f"{against.p:.4f}", against.p)


def in_brackets(interval: tuple[float, float] | None) -> str:
    """An interval as text."""
    return UNKNOWN if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"
