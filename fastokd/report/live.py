"""The interactive form of a report's curves: :class:`Panel` as a Vega-Lite chart, by Altair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastokd.report.charts import Chart, Series, responsive
from fastokd.report.curves import Curve, Panel
from fastokd.report.plots import CYCLE, LINES

HEIGHT = 280  # pixels
# A tooltip names as many curves.
NAMED = 16
HINT = "Drag to move, pinch or Ctrl and the wheel to zoom, double-click to go back; the buttons show and hide."
# Of `LINES`, in CSS and in pixels.
_DASHES: dict[str, tuple[str, list[int]]] = {
    "-": ("solid", []),
    "--": ("dashed", [6, 3]),
    ":": ("dotted", [1, 3]),
    "-.": ("double", [6, 3, 1, 3]),
}


def chart_of(panel: Panel, caption: str, static: str) -> Chart:
    """The panel with ``static``, the same curves as an SVG, for print."""
    styles = [_style(curve) for curve in panel.curves]
    return Chart(
        panel.name,
        panel.title,
        caption,
        spec=responsive(_spec(panel), HEIGHT),
        static=static,
        series=[
            Series(_key(index), curve.label, colour, _DASHES[line][0])
            for index, (curve, (colour, line, _)) in enumerate(
                zip(panel.curves, styles, strict=True)
            )
        ],
        table=panel.table(),
    )


def _key(index: int) -> str:
    """A curve's name in the data; labels may hold anything."""
    return f"c{index}"


def _style(curve: Curve) -> tuple[str, str, float]:
    """Colour, line of :data:`LINES` and width in pixels."""
    if curve.kind == "leader":
        return "currentColor", "-", 2.5
    if curve.kind == "ensemble":
        return "var(--c6)", "--", 2
    return f"var(--c{curve.index % len(CYCLE)})", LINES[curve.index // len(CYCLE) % len(LINES)], 1.5


def _spec(panel: Panel) -> dict[str, Any]:
    import altair as alt

    keys = [_key(index) for index in range(len(panel.curves))]
    colours, lines, widths = zip(*map(_style, panel.curves), strict=True)
    dashes = [_DASHES[line][1] for line in lines]
    scale = alt.Scale(type="log") if panel.logarithmic else alt.Scale(zero=False, nice=True)
    x = alt.X(
        "epoch:Q",
        title="epoch",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(tickMinStep=1, format="d"),
    )
    base = (
        alt.Chart()
        .transform_filter("indexof(hidden, datum.curve) < 0")
        .encode(
            x=x,
            color=alt.Color("curve:N", scale=alt.Scale(domain=keys, range=colours), legend=None),
        )
    )
    line = base.mark_line(aria=False, point=len(_epochs(panel)) < 3).encode(
        y=alt.Y(
            "mean:Q",
            title=None,
            scale=scale,
            axis=alt.Axis(format="~g", tickCount=6, values=_ticks(panel)),
        ),
        strokeDash=alt.StrokeDash(
            "curve:N", scale=alt.Scale(domain=keys, range=dashes), legend=None
        ),
        strokeWidth=alt.StrokeWidth(
            "curve:N", scale=alt.Scale(domain=keys, range=widths), legend=None
        ),
    )
    zoom = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.ctrlKey]")
    layers: list[Any] = [line.add_params(zoom), _hover(panel)]
    if any(any(curve.deviations) for curve in panel.curves):
        band = base.mark_area(opacity=0.2, aria=False, clip=True)
        layers.insert(0, band.encode(y=alt.Y("low:Q"), y2="high:Q"))
    drawn = alt.layer(*layers, data=alt.Data(values=_rows(panel)), description=panel.title)
    spec: dict[str, Any] = drawn.add_params(alt.param(name="hidden", value=[])).to_dict()
    return spec


def _ticks(panel: Panel) -> Any:
    """1, 2 and 5 times the powers of ten of a logarithmic axis; others choose their own."""
    import altair as alt

    if not panel.logarithmic:
        return alt.Undefined
    means = [mean for curve in panel.curves for mean in curve.means if math.isfinite(mean)]
    low, high = (math.floor(math.log10(bound)) for bound in (min(means), max(means)))
    ticks = [float(f"{step}e{power}") for power in range(low, high + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if min(means) / 2 <= tick <= 2 * max(means)]


def _epochs(panel: Panel) -> list[int]:
    return sorted({epoch for curve in panel.curves for epoch in curve.epochs})


def _rows(panel: Panel) -> list[dict[str, Any]]:
    rows = []
    for index, curve in enumerate(panel.curves):
        for epoch, mean, deviation in zip(curve.epochs, curve.means, curve.deviations, strict=True):
            row = {"epoch": epoch, "curve": _key(index), "mean": _short(mean)}
            if deviation:
                # On a logarithmic axis a band doesn't reach down to 0.
                low = max(mean - deviation, mean / 10) if panel.logarithmic else mean - deviation
                row |= {"low": _short(low), "high": _short(mean + deviation)}
            rows.append(row)
    return rows


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _hover(panel: Panel) -> Any:
    """A line at the pointer's epoch, whose tooltip has the numbers of the panel's table."""
    import altair as alt

    near = alt.selection_point(
        name="near",
        on="pointermove",
        nearest=True,
        fields=["epoch"],
        empty=False,
        clear="pointerout",
    )
    shown = panel.curves[:NAMED]
    rows = [
        {"epoch": row[0], **{_key(index): row[index + 1] for index in range(len(shown))}}
        for row in panel.table().rows
    ]
    tips = [alt.Tooltip("epoch:Q", title="epoch"), *_tips(shown)]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_rule(color="currentColor", aria=False)
        .encode(
            x="epoch:Q", opacity=alt.condition(near, alt.value(0.5), alt.value(0)), tooltip=tips
        )
        .add_params(near)
    )


def _tips(curves: Sequence[Curve]) -> list[Any]:
    import altair as alt

    return [alt.Tooltip(f"{_key(i)}:N", title=curve.label) for i, curve in enumerate(curves)]
