"""Parallel coordinates of many runs: an axis for each setting in which they differ, one for the result."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastokd.host.names import in_plot, on_a_line
from fastokd.report.canvas import INK, canvas, plainly
from fastokd.report.charts import quiet, responsive
from fastokd.report.fields import Fields, ordered, said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 360
# More axes and labels than these can't be read.
MOST_AXES, MOST_LABELS = 9, 12
# Of so few numbers each has a label, evenly spaced.
FEW = 8
# The colours from the lowest result to the highest, seen on white and on black.
COLOURS = ((0xE0, 0x8A, 0x00), (0xC0, 0x60, 0x9A), (0x2A, 0x8B, 0xD6))


@dataclass(frozen=True)
class Axis:
    """``heights``: of each run, from 0 to 1. ``texts``: its values. ``ticks``: heights with their labels.
    ``bands``: one for each value, or for a scale."""

    name: str
    heights: tuple[float, ...]
    texts: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float], ...] = ((0.0, 1.0),)


def axes_of(fields: Fields, result: str, values: Sequence[float]) -> list[Axis]:
    """The axes in order, the last the ``result``'s with its ``values``, at least one."""
    last = _scale(result, values, "{:.2f}")
    chosen = list(fields.items())[: MOST_AXES - 1]
    return [*(_axis(name, its, last.heights) for name, its in chosen), last]


def _axis(name: str, values: Sequence[Any], results: Sequence[float]) -> Axis:
    """Many numbers lie on a scale. Words, and few numbers, have a band each, in their order; the runs in a band
    are ordered by their results, so that lines don't cover each other."""
    once = ordered(values)
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(once) > FEW:
        return _scale(name, numbers, "{:.3g}")
    at = {value: i for i, value in enumerate(once)}
    heights = [
        (at[value] + 0.1 + 0.8 * result) / len(once)
        for value, result in zip(values, results, strict=True)
    ]
    every = math.ceil(len(once) / MOST_LABELS)
    ticks = tuple(((at[value] + 0.5) / len(once), said(value)) for value in once[::every])
    bands = tuple(((i + 0.06) / len(once), (i + 0.94) / len(once)) for i in range(len(once)))
    return Axis(name, tuple(heights), tuple(map(said, values)), ticks, bands)


def _scale(name: str, values: Sequence[float], form: str) -> Axis:
    """From the lowest value to the highest, logarithmic if they span a factor of 10."""
    low, high = min(values), max(values)
    logarithmic = 0 < 10 * low <= high
    to, back = (math.log, math.exp) if logarithmic else (float, float)
    first, span = to(low), (to(high) - to(low)) or 1.0
    heights = tuple((to(value) - first) / span for value in values)
    steps = [i / 4 for i in range(5)] if high > low else [0.0]
    ticks = tuple((step, form.format(back(first + step * span))) for step in steps)
    return Axis(name, heights, tuple(f"{value:.6g}" for value in values), ticks)


def colour(height: float) -> str:
    """Of a result at this height."""
    first = min(int(2 * height), 1)
    part = 2 * height - first
    ends = zip(COLOURS[first], COLOURS[first + 1], strict=True)
    return "#{:02x}{:02x}{:02x}".format(*(round(a + part * (b - a)) for a, b in ends))


def parallel_spec(axes: Sequence[Axis], names: Sequence[str]) -> dict[str, Any]:
    """A Vega-Lite chart with one line for each run, called by ``names``.

    The line under the pointer stands out; clicks choose lines (with Shift several). The parameter
    ``shown`` is the list of the runs' numbers that are drawn.
    """
    keys = [f"h{i}" for i in range(len(axes))]
    runs = [
        {
            "run": run,
            "name": on_a_line(name),
            "colour": colour(axes[-1].heights[run]),
            **{key: round(axis.heights[run], 5) for key, axis in zip(keys, axes, strict=True)},
            **{f"t{i}": axis.texts[run] for i, axis in enumerate(axes)},
        }
        for run, name in enumerate(names)
    ]
    ticks = [
        {"axis": key, "height": round(height, 5), "text": text}
        for key, axis in zip(keys, axes, strict=True)
        for height, text in axis.ticks
    ]
    bands = [
        {"axis": key, "from": round(low, 5), "to": round(high, 5)}
        for key, axis in zip(keys, axes, strict=True)
        for low, high in axis.bands
    ]
    labels = json.dumps({key: axis.name for key, axis in zip(keys, axes, strict=True)})
    x = {
        "field": "axis",
        "type": "nominal",
        "scale": {"type": "point", "domain": keys, "padding": 0.5},
        "axis": {
            **{
                "orient": "top",
                "title": None,
                "labelAngle": 0,
                "labelExpr": f"{labels}[datum.value]",
            },
            **{"grid": False, "domain": False, "ticks": False, "labelLimit": 110, "offset": 6},
        },
    }
    y = {"field": "height", "type": "quantitative", "scale": {"domain": [0, 1]}, "axis": None}
    tooltip = [
        {"field": "name", "title": "run"},
        *({"field": f"t{i}", "title": axis.name} for i, axis in enumerate(axes)),
    ]
    lines = {
        "transform": [
            {"filter": "indexof(shown, datum.run) >= 0"},
            {"fold": keys, "as": ["axis", "height"]},
        ],
    }
    line = {
        "x": x,
        "y": y,
        "detail": {"field": "run"},
        "color": {"field": "colour", "type": "nominal", "scale": None},
    }
    opacity = {
        "condition": [
            {"param": "hovered", "empty": False, "value": 1},
            {"param": "chosen", "value": 0.7},
        ],
        "value": 0.07,
    }
    width = {"condition": {"param": "hovered", "empty": False, "value": 4}, "value": 1.5}
    text = {"type": "text", "align": "left", "dx": 5, "fontSize": 11, "limit": 110}
    written = {"x": x, "y": y, "text": {"field": "text"}}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": bands},
            "mark": {"type": "rule", "color": "currentColor", "opacity": 0.6, "strokeWidth": 2},
            "encoding": {"x": x, "y": {**y, "field": "from"}, "y2": {"field": "to"}},
        },
        {**lines, "mark": "line", "encoding": {**line, "opacity": opacity, "strokeWidth": width}},
        {
            # Wide and unseen, so that the pointer needn't hit a thin line.
            **lines,
            "mark": {"type": "line", "strokeWidth": 10, "opacity": 0},
            "encoding": {**line, "tooltip": tooltip},
            "params": [
                _of_runs("hovered", on="pointerover", clear="pointerout"),
                _of_runs("chosen", on="click", toggle="event.shiftKey"),
            ],
        },
        *(
            {"data": {"values": ticks}, "mark": {**text, **ink}, "encoding": written}
            for ink in (
                {"stroke": "var(--page)", "strokeWidth": 3},
                {"fill": "currentColor"},
            )
        ),
    ]
    spec = {
        "params": [{"name": "shown", "value": [*range(len(names))]}],
        "data": {"values": runs},
        "layer": layers,
        **quiet("parallel coordinates of the runs, whose numbers are in the table of every run"),
    }
    return responsive(spec, HEIGHT)


def _of_runs(name: str, **how: str) -> dict[str, Any]:
    return {"name": name, "select": {"type": "point", "fields": ["run"], **how}}


def draw_parallel(axes: Sequence[Axis]) -> Figure:
    """The same as a static figure."""
    with plainly():
        figure = canvas(max(5.0, 1.3 * len(axes)), 3.6)
        plot = figure.subplots()
        heights = zip(*(axis.heights for axis in axes), strict=True)
        for run in sorted(heights, key=lambda run: run[-1]):
            plot.plot(run, color=colour(run[-1]), linewidth=1, alpha=0.8)
        for place, axis in enumerate(axes):
            for band in axis.bands:
                plot.plot((place, place), band, color=INK, linewidth=1.5, alpha=0.6)
            for height, text in axis.ticks:
                plot.text(place + 0.04, height, in_plot(text), fontsize=7, va="center")
        plot.set_xticks(range(len(axes)), [in_plot(axis.name) for axis in axes], fontsize=8)
        plot.xaxis.tick_top()
        plot.tick_params(length=0)
        plot.set_xlim(-0.1, len(axes) - 0.4)
        plot.set_yticks([])
        plot.spines[:].set_visible(False)
    return figure
