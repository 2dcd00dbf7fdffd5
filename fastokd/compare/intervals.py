"""Accuracies and differences with their intervals, row by row, as Vega-Lite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastokd.compare.figures import AGAINST, shown_rows
from fastokd.compare.marks import TIPS, Spec, common, of_conditions, top1
from fastokd.compare.results import Against, Row, Section
from fastokd.compare.tables import in_p
from fastokd.report.charts import responsive, short
from fastokd.report.plots import in_variables
from fastokd.report.tables import Written

LINE = 20  # pixels of a line of text, and of an interval


def accuracy_spec(found: Sequence[Section]) -> Spec:
    """The kept student of each row, with its interval and each seed."""
    labels = dict.fromkeys(row.contestant.label for section in found for row in shown_rows(section))
    place = {label: index for index, label in enumerate(labels)}
    values: list[Spec] = []
    for section in found:
        for row in shown_rows(section):
            at = f"{place[row.contestant.label]}"
            line = {"condition": section.condition.title, "at": at, "colour": _colour(row)}
            values.append({**line, **common(row)})
            values += [{**line, "row": row.contestant.label, "seed": one.entry.seed, "one": short(one.kept),
                        "run": one.entry.run.folder} for one in row.outcomes]  # fmt: skip
    y = _lines([line for index in range(len(place)) for line in (f"head{index}", f"{index}")])
    heads = [(f"head{index}", label) for label, index in place.items()]
    x = {"field": "kept", **top1("kept student, test top-1 (%)")}
    tips = [{"field": name} for name in ("row", "seed", "run")]
    seeds = {
        "mark": {"type": "tick", "thickness": 2, "size": 14, "color": "currentColor", "opacity": 0.6},
        "encoding": {"x": {"field": "one", **top1(None)}, "y": y,
                     "tooltip": [*tips, {"field": "one", "title": "kept, test top-1 (%)"}]},
    }  # fmt: skip
    main = {"encoding": {"x": x, "y": y}, "layer": _intervals(TIPS)}
    spec = {"data": {"values": values}, "layer": [main, seeds, _heads(heads, y)]}
    return responsive(of_conditions(found, spec), 60 + 2 * LINE * len(place))


def difference_spec(found: Sequence[Section]) -> Spec:
    """Each row minus the students alone that it is compared with, with intervals."""
    known = [(row.contestant.label, *row.against) for section in found for row in section.rows]
    domain: list[str] = []
    for label in dict.fromkeys(label for label, *against in known if against):
        its = {one for other, *against in known if other == label for one in against}
        domain += [f"head {label}", *(f"{label} {one}" for one in AGAINST if one in its)]
    values: list[Spec] = []
    for section in found:
        for row in section.rows:
            for against, one in row.against.items():
                difference = one.paired.difference
                low, high = difference.interval or (None, None)
                values.append({
                    "condition": section.condition.title, "row": row.contestant.label,
                    "at": f"{row.contestant.label} {against}", "colour": in_variables(AGAINST[against][1]),
                    "against": one.other, "pairs": one.paired.pairs, "p": _said_p(one),
                    "value": short(difference.value), "said": difference.text(),
                    "low": short(low), "high": short(high),
                })  # fmt: skip
    y = _lines(domain)
    x = {
        "field": "value",
        "type": "quantitative",
        "title": "points of the kept student's test top-1",
    }
    tips = [
        {"field": "row"}, {"field": "against", "title": "minus"}, {"field": "said", "title": "points"},
        {"field": "p", "title": "p (Holm)"}, {"field": "pairs", "title": "pairs of seeds"},
    ]  # fmt: skip
    zero = {
        "data": {"values": [{"zero": 0}]},
        "mark": {"type": "rule", "color": "currentColor", "opacity": 0.6},
        "encoding": {"x": {"field": "zero", "type": "quantitative"}},
    }
    main = {"encoding": {"x": x, "y": y}, "layer": _intervals(tips)}
    heads = [(at, at.removeprefix("head ")) for at in domain if at.startswith("head ")]
    spec = {"data": {"values": values}, "layer": [zero, main, _heads(heads, y)]}
    return responsive(of_conditions(found, spec), 60 + LINE * len(domain))


def _said_p(one: Against) -> str:
    cell = in_p(one)
    return cell.text if isinstance(cell, Written) else cell or "not tested"


def _lines(domain: Sequence[str]) -> Spec:
    """A vertical axis of lines without labels: a heading of each row, and under it its intervals."""
    return {"field": "at", "type": "nominal", "scale": {"domain": domain}, "axis": None}


def _intervals(tips: list[Spec]) -> list[Spec]:
    """Layers of a value with its interval; wide unseen rules are easily pointed at."""
    colour = {"field": "colour", "type": "nominal", "scale": None}
    ends = {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}}
    return [
        {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {**ends, "color": colour}},
        {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": {"color": colour, "tooltip": tips}},
        {"mark": {"type": "rule", "strokeWidth": 16, "opacity": 0}, "encoding": {**ends, "tooltip": tips}},
    ]  # fmt: skip


def _heads(rows: Iterable[tuple[str, str]], y: Spec) -> Spec:
    """A layer of headings: the line of each, and its text."""
    return {
        "data": {"values": [{"at": at, "text": text} for at, text in rows]},
        "mark": {"type": "text", "align": "left", "baseline": "middle", "fontSize": 12},
        "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "text"}},
    }


def _colour(row: Row) -> str:
    return "var(--c0)" if row.contestant.kind == "method" else "var(--c1)"
