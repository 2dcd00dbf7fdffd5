"""Accuracy against cost and conditions, and calibration, as Vega-Lite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastokd.compare.figures import conditions_by, shown_rows
from fastokd.compare.marks import (
    TIPS,
    Spec,
    by_dash,
    by_row,
    common,
    hideable,
    of_conditions,
    top1,
)
from fastokd.compare.results import Row, Section
from fastokd.measured.answers import pooled
from fastokd.report.charts import responsive, short
from fastokd.report.tables import Column, Table

HEIGHT = 320  # pixels


def cost_spec(found: Sequence[Section]) -> Spec:
    """Accuracy against multiply-accumulates."""
    rows = shown_rows(found[0])
    keys = {row.contestant.label: f"c{index}" for index, row in enumerate(rows)}
    values = [
        {"condition": s.condition.title, "key": keys[row.contestant.label], "spent": row.macs, **common(row)}
        for s in found for row in shown_rows(s) if row.contestant.label in keys
    ]  # fmt: skip
    spent = [row.macs for row in rows]
    x = {
        "field": "spent", "type": "quantitative", "title": "multiply-accumulates spent by a run",
        "scale": {"type": "log", "domain": [min(spent) / 1.5, max(spent) * 1.5]},
        "axis": {"format": "~s", "tickCount": 4, "labelOverlap": True},
    }  # fmt: skip
    y = {"field": "kept", **top1(None)}
    rule = {"y": {"field": "low", "type": "quantitative", "scale": {"zero": False}}, "y2": {"field": "high"}}  # fmt: skip
    zoom = {"name": "zoom", "bind": "scales",
            "select": {"type": "interval", "zoom": "wheel![event.ctrlKey]"}}  # fmt: skip
    spec = {
        "data": {"values": values},
        **hideable(),
        "encoding": {"x": x, "color": by_row(rows)},
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2, "clip": True}, "encoding": rule},
            {"mark": {"type": "point", "filled": True, "size": 80, "opacity": 1, "clip": True},
             "encoding": {"y": y, "tooltip": TIPS}, "params": [zoom]},
        ],
    }  # fmt: skip
    return responsive(of_conditions(found, spec), HEIGHT)


def reliability_spec(section: Section) -> Spec:
    """Accuracy against confidence."""
    rows = shown_rows(section)
    values = [
        {"key": f"c{index}", "row": row.contestant.label, "confidence": short(confidence),
         "right": short(right), "images": count}
        for index, row in enumerate(rows) for confidence, right, count in _bins(row)
    ]  # fmt: skip
    x = {"field": "confidence", "type": "quantitative", "title": "mean confidence of a bin"}
    y = {"field": "right", "type": "quantitative", "title": None}
    tips = [{"field": name} for name in ("row", "confidence", "images")]
    equal = {
        "data": {"values": [{"from": 0, "to": 1}]},
        "mark": {"type": "rule", "color": "currentColor", "opacity": 0.5},
        "encoding": {
            "x": {"field": "from", "type": "quantitative"}, "x2": {"field": "to"},
            "y": {"field": "from", "type": "quantitative"}, "y2": {"field": "to"},
        },
    }  # fmt: skip
    shown = {
        "transform": hideable()["transform"],
        "encoding": {"x": x, "y": y, "color": by_row(rows)},
    }
    marks = [
        {"mark": "line", "encoding": {"strokeDash": by_dash(rows)}},
        {"mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
         "encoding": {"tooltip": [*tips, {"field": "right", "title": "accuracy"}]}},
    ]  # fmt: skip
    spec = {"data": {"values": values}, "params": hideable()["params"], "layer": [equal, {**shown, "layer": marks}]}  # fmt: skip
    return responsive(spec, HEIGHT)


def reliability_table(section: Section) -> Table:
    """The points of the reliability diagram."""
    columns = (Column("row", text=True), *map(Column, ("images", "mean confidence", "accuracy")))
    rows = tuple(
        (row.contestant.label, count, f"{confidence:.4f}", f"{right:.4f}")
        for row in shown_rows(section)
        for confidence, right, count in _bins(row)
    )
    return Table("reliability-numbers", "Calibration", columns, rows)


def _bins(row: Row) -> list[tuple[float, float, int]]:
    found = pooled([one.calibration for one in row.outcomes])
    return [(confidence, right, int(count)) for confidence, right, count in found]


def curves_spec(found: Sequence[Section], value: Callable[[Section], float], title: str) -> Spec:
    """Accuracy over the conditions that differ in ``value``."""
    sections = conditions_by(found, value)
    rows = shown_rows(found[0])
    keys = {row.contestant.label: f"c{index}" for index, row in enumerate(rows)}
    values = [
        {"key": keys[row.contestant.label], "at": value(section), **common(row)}
        for section in sections for row in shown_rows(section) if row.contestant.label in keys
    ]  # fmt: skip
    logarithmic = value(found[0]) == 100
    x = {"field": "at", "type": "quantitative", "title": title,
         "scale": {"type": "log"} if logarithmic else {}, "axis": {"tickCount": 5}}  # fmt: skip
    y = {"field": "kept", **top1(None)}
    rule = {"y": {"field": "low", "type": "quantitative", "scale": {"zero": False}}, "y2": {"field": "high"}}  # fmt: skip
    tips = [TIPS[0], {"field": "at", "title": title}, *TIPS[1:]]
    spec = {
        "data": {"values": values},
        **hideable(),
        "encoding": {"x": x, "color": by_row(rows)},
        "layer": [
            {"mark": "rule", "encoding": rule},
            {"mark": "line", "encoding": {"y": y, "strokeDash": by_dash(rows)}},
            {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": {"y": y, "tooltip": tips}},
        ],
    }  # fmt: skip
    return responsive(spec, HEIGHT)
