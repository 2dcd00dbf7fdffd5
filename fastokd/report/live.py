"""The interactive form of a report's curves: :class:`Panel` as a Vega-Lite chart, by Altair."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from fastokd.report.charts import DASHES, Chart, Series, responsive, short
from fastokd.report.curves import Curve, Panel
from fastokd.report.plots import CYCLE, LINES

HEIGHT = 280  # pixels
# Epochs that have a tick each.
FEW = 12
# A tooltip names as many curves.
NAMED = 16
HINT = "Drag to move, pinch or Ctrl and the wheel to zoom, double-click to go back; the buttons show and hide."


def chart_of(panel: Panel, caption: str, static: str) -> Chart:
    """The panel with ``static``, the same curves as an SVG, for print."""
    styles = [_style(curve) for curve in panel.curves]
    return Chart(
        panel.name,
        panel.heading,
        caption,
        spec=responsive(_spec(panel), HEIGHT),
        static=static,
        series=[
            Series(_key(index), curve.label, colour, DASHES[line][0])
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
    dashes = [DASHES[line][1] for line in lines]
    scale = alt.Scale(type="log") if panel.logarithmic else alt.Scale(zero=False, nice=True)
    x = alt.X(
        "epoch:Q",
        title="epoch",
        scale=alt.Scale(nice=False),
        axis=_epoch_axis(panel),
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
            axis=_axis(panel),
        ),
        strokeDash=alt.StrokeDash(
            "curve:N", scale=alt.Scale(domain=keys, range=dashes), legend=None
        ),
        # Ordinal, since Vega-Lite warns of widths without an order.
        strokeWidth=alt.StrokeWidth(
            "curve:O", scale=alt.Scale(domain=keys, range=widths), legend=None
        ),
    )
    zoom = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.ctrlKey]")
    layers: list[Any] = [line.add_params(zoom), _hover(panel)]
    if any(any(curve.deviations) for curve in panel.curves):
        band = base.mark_area(opacity=0.2, aria=False, clip=True)
        layers.insert(0, band.encode(y=alt.Y("low:Q"), y2="high:Q"))
    drawn = alt.layer(*layers, data=alt.NamedData("curves"), description=panel.heading)
    spec: dict[str, Any] = drawn.add_params(alt.param(name="hidden", value=[])).to_dict()
    # Altair would check every row.
    return {**spec, "datasets": {"curves": _rows(panel), "epochs": _hover_rows(panel)}}


def _epoch_axis(panel: Panel) -> Any:
    """Few epochs have a tick each; others whole ones anyway."""
    import altair as alt

    epochs = _epochs(panel)
    few: dict[str, Any] = {"values": epochs} if len(epochs) <= FEW else {}
    return alt.Axis(format="d", **few)


def _axis(panel: Panel) -> Any:
    """A logarithmic axis has ticks at 1, 2 and 5 times the powers of ten."""
    import altair as alt

    if not panel.logarithmic:
        return alt.Axis(tickCount=6, format=".6~g")
    means = [mean for curve in panel.curves for mean in curve.means if math.isfinite(mean)]
    least, most = min(means) / 2, max(means) * 2
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]
    return alt.Axis(format=".6~g", values=[tick for tick in ticks if least <= tick <= most])


def _epochs(panel: Panel) -> list[int]:
    return sorted({epoch for curve in panel.curves for epoch in curve.epochs})


def _rows(panel: Panel) -> list[dict[str, Any]]:
    rows = []
    for index, curve in enumerate(panel.curves):
        for epoch, mean, deviation in zip(curve.epochs, curve.means, curve.deviations, strict=True):
            row = {"epoch": epoch, "curve": _key(index), "mean": short(mean)}
            if deviation:
                # On a logarithmic axis a band doesn't reach down to 0.
                low = max(mean - deviation, mean / 10) if panel.logarithmic else mean - deviation
                row |= {"low": short(low), "high": short(mean + deviation)}
            rows.append(row)
    return rows


def _hover(panel: Panel) -> Any:
    """A line at the pointer's epoch, and a tooltip with that row of the panel's table."""
    import altair as alt

    near = alt.selection_point(
        name="near", on="pointerover", fields=["epoch"], empty=False, clear="pointerout"
    )
    tips = [
        alt.Tooltip("epoch:Q", title="epoch"),
        *(alt.Tooltip(f"{_key(i)}:N", title=c.label) for i, c in enumerate(panel.curves[:NAMED])),
    ]
    base = alt.Chart(alt.NamedData("epochs"))
    rule = base.mark_rule(color="currentColor", aria=False).encode(
        x="epoch:Q", opacity=alt.condition(near, alt.value(0.5), alt.value(0))
    )
    # The tooltip belongs to a transparent strip: Vega-Lite shows no text for the nearest point.
    strip = base.mark_rect(color="transparent", aria=False, clip=True).encode(
        x="from:Q", x2="to:Q", tooltip=tips
    )
    return rule + strip.add_params(near)


def _hover_rows(panel: Panel) -> list[dict[str, Any]]:
    """The table's rows, each with the range of epochs ``from`` and ``to`` in which its tooltip is shown."""
    epochs = _epochs(panel)
    first, last = epochs[0], epochs[-1]
    edges = [first - float(first == last)]
    edges += [(a + b) / 2 for a, b in pairwise(epochs)]
    edges += [last + float(first == last)]
    return [
        {"epoch": epoch, "from": low, "to": high}
        | {_key(index): cell for index, cell in enumerate(cells[:NAMED])}
        for (epoch, *cells), (low, high) in zip(panel.table().rows, pairwise(edges), strict=True)
    ]
