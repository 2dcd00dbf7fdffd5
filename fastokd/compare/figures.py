"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastokd.compare.results import Row, Section
from fastokd.host.names import in_plot, in_prefix
from fastokd.measured.answers import BINS, pooled
from fastokd.report.canvas import INK, canvas, plainly
from fastokd.report.plots import CYCLE, HEIGHT, LINES, WIDTH

MARKS = "osD^v<>PXp"
# What a row is compared with: in words, and its colour.
AGAINST = {
    "images": ("one student, same images", CYCLE[0]),
    "macs": ("one student, as many MACs", CYCLE[2]),
    "larger": ("the larger student", CYCLE[3]),
}


def figures_of(found: Sequence[Section]) -> dict[str, Any]:
    """The figures by name: ``accuracy``, ``difference`` (from students alone) and ``cost`` (accuracy against
    multiply-accumulates) of the whole training set, ``reliability`` of its kept students, and ``noise`` and
    ``fraction`` where there are such conditions."""
    with plainly():
        drawn = {
            "accuracy": _accuracy(found[0]),
            "difference": _difference(found[0]),
            "cost": _cost(found[0]),
            "reliability": _reliability(found[0]),
            "noise": _curves(
                found, lambda s: 100 * s.condition.label_noise, "wrong training labels (%)"
            ),
            "fraction": _curves(
                found, lambda s: 100 * s.condition.fraction, "training images used (%)"
            ),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": CYCLE[index % len(CYCLE)],
        "linestyle": LINES[index // len(CYCLE) % len(LINES)],
        "marker": MARKS[index % len(MARKS)],
        "markersize": 4,
    }


def shown_rows(section: Section) -> list[Row]:
    """The rows of students that are compared, without teachers."""
    return [row for row in section.rows if row.contestant.kind != "teacher"]


def _half(row: Row) -> float:
    """Half of the 95% interval; 0 where it is unknown."""
    return 0.0 if row.interval is None else row.interval[1] - row.kept.mean


def _accuracy(section: Section) -> Any:
    rows = shown_rows(section)[::-1]
    figure = canvas(WIDTH, 0.9 + 0.28 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = CYCLE[0] if row.contestant.kind == "method" else CYCLE[1]
        axes.errorbar(row.kept.mean, place, xerr=_half(row), fmt="o", capsize=3, color=colour)
        axes.plot([one.kept for one in row.outcomes], [place] * len(row.outcomes), "|", color=INK)
    axes.set_yticks(range(len(rows)), [in_plot(row.contestant.label) for row in rows], fontsize=8)
    axes.grid(visible=True, axis="x")
    axes.set(title="kept student, test top-1 (%)")
    return figure


def _difference(section: Section) -> Any:
    """The differences of each row, with their intervals; None without any."""
    rows = [row for row in section.rows if row.against][::-1]
    if not rows:
        return None
    figure, axes = _legended(len(rows) + len(AGAINST))
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
    for shift, (against, (label, colour)) in enumerate(AGAINST.items()):
        places = [place for place, row in enumerate(rows) if against in row.against]
        found = [rows[place].against[against].paired.difference for place in places]
        if found:
            half = [0.0 if d.interval is None else d.interval[1] - d.value for d in found]
            at = [place + 0.2 * (1 - shift) for place in places]
            values, style = [d.value for d in found], {"fmt": "o", "capsize": 3, "markersize": 4}
            axes.errorbar(values, at, xerr=half, color=colour, label=label, **style)
    axes.set_yticks(range(len(rows)), [in_plot(row.contestant.label) for row in rows], fontsize=8)
    axes.set(title="difference in test top-1 (points)")
    _legend(figure, axes)
    return figure


def _legended(handles: int) -> tuple[Any, Any]:
    figure = canvas(WIDTH, HEIGHT + 0.2 * handles)
    axes = figure.subplots()
    axes.grid(visible=True)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=1, fontsize="small")


def _logarithmic(axes: Any) -> None:
    """A logarithmic x axis, its numbers as plain text: formulas aren't drawn."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        major_formatter=lambda value, _: in_prefix(value),
        minor_formatter=NullFormatter(),
    )


def _cost(section: Section) -> Any:
    rows = shown_rows(section)
    figure, axes = _legended(len(rows))
    for index, row in enumerate(rows):
        style = {**_style(index), "linestyle": "none"}
        label = in_plot(row.contestant.label)
        axes.errorbar(row.macs, row.kept.mean, yerr=_half(row), capsize=3, label=label, **style)
    _logarithmic(axes)
    axes.set(title="kept student, test top-1 (%)", xlabel="multiply-accumulates spent by a run")
    _legend(figure, axes)
    return figure


def _reliability(section: Section) -> Any:
    rows = shown_rows(section)
    figure, axes = _legended(len(rows))
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
    for index, row in enumerate(rows):
        points = pooled([one.calibration for one in row.outcomes])
        confidence, right, _ = zip(*points, strict=True)
        axes.plot(
            confidence, right, linewidth=1, label=in_plot(row.contestant.label), **_style(index)
        )
    axes.set(title=f"accuracy of the test images in {BINS} bins", xlabel="mean confidence")
    _legend(figure, axes)
    return figure


def conditions_by(found: Sequence[Section], value: Callable[[Section], float]) -> list[Section]:
    """The whole training set and the conditions that differ from it in ``value``."""
    return [found[0], *(section for section in found if value(section) != value(found[0]))]


def _curves(found: Sequence[Section], value: Callable[[Section], float], title: str) -> Any:
    """Accuracy over the conditions whose ``value`` differs from the whole set's; None without any."""
    whole, sections = found[0], conditions_by(found, value)
    if len(sections) < 2:
        return None
    rows = shown_rows(whole)
    figure, axes = _legended(len(rows))
    for index, row in enumerate(rows):
        points = sorted(
            (value(section), its.kept.mean, _half(its))
            for section in sections
            for its in section.rows
            if its.contestant.label == row.contestant.label
        )
        x, y, half = zip(*points, strict=True)
        axes.errorbar(
            x, y, yerr=half, capsize=3, label=in_plot(row.contestant.label), **_style(index)
        )
    if value(whole) == 100:
        _logarithmic(axes)
    axes.set(title="kept student, test top-1 (%)", xlabel=title)
    _legend(figure, axes)
    return figure
