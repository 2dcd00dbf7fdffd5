"""What the interactive charts of a comparison have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastokd.compare.results import Row, Section
from fastokd.compare.tables import in_brackets
from fastokd.host.names import in_prefix
from fastokd.report.charts import DASHES, Series, short
from fastokd.report.plots import CYCLE

# Of Vega-Lite.
Spec = dict[str, Any]
TIPS = [
    {"field": "row"},
    {"field": "said", "title": "kept, test top-1"},
    {"field": "interval", "title": "95% interval"},
    {"field": "seeds"},
    {"field": "macs", "title": "MACs of a run"},
]


def series_of(rows: Sequence[Row]) -> list[Series]:
    """A button for each row, with the colour and the dashes of its marks."""
    return [
        Series(f"c{index}", row.contestant.label, f"var(--c{index % len(CYCLE)})", _dash(index))
        for index, row in enumerate(rows)
    ]


def _dash(index: int) -> str:
    return [css for css, _ in DASHES.values()][index // len(CYCLE) % len(DASHES)]


def common(row: Row) -> Spec:
    """What a tooltip says of a row."""
    return {
        "row": row.contestant.label,
        "kept": short(row.kept.mean),
        "said": f"{row.kept} (%)",
        "interval": in_brackets(row.interval),
        "seeds": len(row.outcomes),
        "macs": f"{in_prefix(row.macs)}, counted",
        **({} if row.interval is None else {"low": short(row.interval[0]), "high": short(row.interval[1])}),
    }  # fmt: skip


def of_conditions(found: Sequence[Section], spec: Spec) -> Spec:
    """The chart ``spec`` with a choice of the condition, if there are several."""
    titles = [section.condition.title for section in found]
    if len(titles) == 1:
        return spec
    choice = {"input": "select", "options": titles, "name": "training set "}
    param = {"name": "condition", "value": titles[0], "bind": choice}
    only = {"filter": "datum.condition === condition"}
    return {
        **spec,
        "params": [*spec.get("params", []), param],
        "transform": [only, *spec.get("transform", [])],
    }


def hideable() -> Spec:
    """The parameter and the filter by which buttons hide rows."""
    return {
        "params": [{"name": "hidden", "value": []}],
        "transform": [{"filter": "indexof(hidden, datum.key) < 0"}],
    }


def top1(title: str | None) -> Spec:
    """A channel of accuracies."""
    return {"type": "quantitative", "title": title, "scale": {"zero": False}}


def by_row(rows: Sequence[Row]) -> Spec:
    """The colours of :func:`series_of`."""
    series = series_of(rows)
    scale = {"domain": [one.key for one in series], "range": [one.colour for one in series]}
    return {"field": "key", "type": "nominal", "scale": scale, "legend": None}


def by_dash(rows: Sequence[Row]) -> Spec:
    """Their dashes."""
    series = series_of(rows)
    pixels = dict(DASHES.values())
    scale = {"domain": [one.key for one in series], "range": [pixels[one.dash] for one in series]}
    return {"field": "key", "type": "nominal", "scale": scale, "legend": None}
