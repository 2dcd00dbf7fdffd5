"""What the kept student of a run says on the test images: classes, calibration, mistakes. All of it is of
``answers.safetensors``."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from fastokd.host.names import counted, in_html
from fastokd.measured.answers import BINS, Answers, pooled
from fastokd.report.canvas import INK, canvas, plainly
from fastokd.report.charts import Chart, as_figure, responsive
from fastokd.report.html_tables import as_html
from fastokd.report.live import HEIGHT
from fastokd.report.plots import CYCLE, WIDTH, as_svg, in_page
from fastokd.report.statistics import wilson
from fastokd.report.tables import Cell, Column, Table

# More classes than this have no matrix.
MOST_IN_MATRIX = 30
PAIRS = 20
WORST = 20
MISTAKES = 12


def classes_sections(answers: Answers) -> str:
    """Confusion, accuracy by class, calibration and mistakes of the kept student, as HTML."""
    C = len(answers.classes)
    who = f"{answers.names[answers.kept]}, {counted(len(answers.labels_N), 'test image')}, {answers.how}"
    confusion = _matrix(answers) if C <= MOST_IN_MATRIX else _pairs(answers)
    return "\n".join(
        [
            f'<p class="note">Of the kept network: {in_html(who)}, after step {answers.step:,}.</p>',
            f'<div class="columns"><div>{confusion}</div><div>{_by_class(answers)}</div></div>',
            f'<div class="figures">{as_figure(calibration_chart(answers))}</div>',
            _mistakes(answers),
        ]
    )


def _table(
    name: str, caption: str, heads: Sequence[str], rows: Sequence[str], words: int = 0
) -> str:
    """A table of rows of HTML; ``heads`` are HTML, too. The first ``words`` columns aren't numbers; without any,
    the table isn't sorted by its heads."""
    head = "".join(
        f'<th scope="col"{" class=text" if index < words else ""}>{text}</th>'
        for index, text in enumerate(heads)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{in_html(caption)}">'
        f'<table id="{name}"{"" if words else " class=unsorted"}><caption>{in_html(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(value: float, text: str, attributes: str = "") -> str:
    return f'<td data-value="{value:.8g}"{attributes}>{text}</td>'


def _matrix(answers: Answers) -> str:
    """A cell's colour is its share of the row; those of mistakes are stretched by a square root."""
    counts = answers.confusion_CC(answers.kept).tolist()
    names = [in_html(name) for name in answers.classes]
    upright = ' class="upright"' if max(map(len, answers.classes)) > 3 else ""
    heads = ["label", *(f"<span{upright}>{name}</span>" for name in names)]
    rows = []
    for label, found in enumerate(counts):
        total = max(1, sum(found))
        cells = []
        for choice, count in enumerate(found):
            right = label == choice
            share = count / total if right else math.sqrt(count / total)
            kind = "right" if right else "wrong"
            shown = f"{count:,}" if count or right else '<span class="none">0</span>'
            cells.append(f'<td class="{kind}" style="--share:{share:.3f}">{shown}</td>')
        rows.append(f'<tr><th scope="row">{names[label]}</th>{"".join(cells)}</tr>')
    caption = "Confusion matrix: test images of each class (row) by the network's choice (column)"
    return f'<h3>Confusion matrix</h3><div class="matrix">{_table("confusion", caption, heads, rows)}</div>'


def _pairs(answers: Answers) -> str:
    counts_CC = answers.confusion_CC(answers.kept)
    totals_C = counts_CC.sum(1).tolist()
    wrong_CC = counts_CC.clone().fill_diagonal_(0)
    values_K, order_K = wrong_CC.flatten().topk(min(PAIRS, wrong_CC.numel()))
    rows: list[tuple[Cell, ...]] = []
    for count, place in zip(values_K.tolist(), order_K.tolist(), strict=True):
        label, choice = divmod(place, len(answers.classes))
        if count:
            share = 100 * count / totals_C[label]
            names = answers.classes[label], answers.classes[choice]
            rows.append((*names, count, f"{share:.1f}"))
    columns = (
        Column("label", text=True),
        Column("network's choice", text=True),
        Column("images"),
        Column("% of the label's"),
    )
    title = f"The {len(rows)} most confused pairs of {len(answers.classes):,} classes"
    return f"<h3>Most confused pairs</h3>{as_html(Table('pairs', title, columns, tuple(rows)))}"


def _by_class(answers: Answers) -> str:
    """The worst classes first; of many classes, the others are folded away."""
    accuracy_C, count_C = (values_C.tolist() for values_C in answers.by_class(answers.kept))
    known = [c for c, count in enumerate(count_C) if count]
    order = sorted(known, key=lambda c: accuracy_C[c])
    rows = [_class_row(answers.classes[c], accuracy_C[c], count_C[c]) for c in order]
    heads = ["class", "images", "top-1 (%)", "95% interval"]
    note = "the worst first, with Wilson's intervals"
    if len(rows) <= MOST_IN_MATRIX:
        shown = _table("by-class", f"Accuracy of each class, {note}", heads, rows, 1)
    else:
        worst = _table("by-class", f"The {WORST} worst classes, {note}", heads, rows[:WORST], 1)
        whole = _table("by-class-all", f"Accuracy of each class, {note}", heads, rows, 1)
        summary = f"<summary>All {len(rows):,} classes</summary>"
        shown = f'{worst}<details class="data">{summary}{whole}</details>'
    return f"<h3>Accuracy by class</h3>{shown}"


def _class_row(name: str, accuracy: float, count: int) -> str:
    low, high = (100 * bound for bound in wilson(accuracy, count))
    shares = f' class="bar" style="--share:{accuracy:.4f}"'
    cells = [
        _number(count, f"{count:,}"),
        _number(accuracy, f"{100 * accuracy:.2f}", shares),
        _number(low, f"{low:.1f} to {high:.1f}"),
    ]
    return f'<tr><th scope="row" class="text">{in_html(name)}</th>{"".join(cells)}</tr>'


def calibration_chart(answers: Answers) -> Chart:
    """Accuracy against confidence of the kept network, in bins."""
    calibration = answers.calibration(answers.kept)
    points = pooled([calibration])
    title = f"accuracy of the test images in {BINS} bins of confidence"
    rows = tuple(
        (f"{100 * confidence:.2f}", f"{100 * right:.2f}", count)
        for confidence, right, count in points
    )
    columns = (Column("mean confidence (%)"), Column("accuracy (%)"), Column("images"))
    caption = (
        f"Expected calibration error (ECE) {100 * calibration.ece:.2f} points. On the thin line confidence "
        "and accuracy are equal; below it the network is overconfident. A point's area grows with its images."
    )
    return Chart(
        "calibration",
        "Calibration",
        caption,
        spec=responsive(_calibration_spec(points, title), HEIGHT),
        static=_calibration_svg(points, title),
        table=Table("calibration-numbers", title, columns, rows),
    )


def _calibration_spec(points: Sequence[tuple[float, float, int]], title: str) -> dict[str, Any]:
    import altair as alt

    rows = [
        {"confidence": round(c, 6), "accuracy": round(a, 6), "images": n, "gap": round(c - a, 6)}
        for c, a, n in points
    ]
    unit = alt.Scale(domain=[0, 1])
    line = (
        alt.Chart(alt.Data(values=[{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        .mark_line(color="currentColor", opacity=0.5, strokeWidth=1, aria=False)
        .encode(x=alt.X("x:Q", title="mean confidence", scale=unit), y=alt.Y("y:Q", title=None))
    )
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("confidence:Q", scale=unit), y=alt.Y("accuracy:Q", scale=unit)
    )
    tips = [
        alt.Tooltip(f"{name}:Q", title=shown, format=form)
        for name, shown, form in (
            ("confidence", "mean confidence", ".2%"),
            ("accuracy", "accuracy", ".2%"),
            ("gap", "confidence minus accuracy", "+.2%"),
            ("images", "images", ","),
        )
    ]
    joined = base.mark_line(color="var(--c0)", strokeWidth=1, aria=False)
    size = alt.Size("images:Q", scale=alt.Scale(range=[20, 400]), legend=None)
    dots = base.mark_point(filled=True, color="var(--c0)", opacity=0.8).encode(
        size=size, tooltip=tips
    )
    spec: dict[str, Any] = alt.layer(line, joined, dots, description=title).to_dict()
    return spec


def _calibration_svg(points: Sequence[tuple[float, float, int]], title: str) -> str:
    with plainly():
        figure = canvas(WIDTH, 3.2)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
        confidence, right, count = zip(*points, strict=True)
        areas = [10 + 150 * number / max(count) for number in count]
        axes.plot(confidence, right, linewidth=1, color=CYCLE[0])
        axes.scatter(confidence, right, s=areas, color=CYCLE[0], alpha=0.8)
        axes.grid(visible=True)
        axes.set(title=title, xlabel="mean confidence", xlim=(0, 1.02), ylim=(0, 1.02))
    return in_page(as_svg(figure))


def _mistakes(answers: Answers) -> str:
    indices = answers.mistakes(answers.kept, MISTAKES)
    if not indices:
        return "<h3>Mistakes</h3><p>None: every test image is classified right.</p>"
    pictures = answers.pictures()
    shown = "".join(_mistake(answers, index, pictures.get(index)) for index in indices)
    right = answers.right(answers.kept)
    return (
        f"<h3>Most confident mistakes</h3><p>The {len(indices)} of {int((~right).sum()):,} wrong test images "
        f'with the highest confidence, and what each network says.</p><ul class="mistakes">{shown}</ul>'
    )


def _mistake(answers: Answers, index: int, png: bytes | None) -> str:
    label = answers.classes[int(answers.labels_N[index])]
    picture = ""
    if png is not None:
        data = base64.b64encode(png).decode()
        alt = in_html(f"test image {index}, labelled {label}")
        picture = f'<img src="data:image/png;base64,{data}" alt="{alt}" width="96" height="96">'
    said = "".join(
        f"<tr{' class=kept' if row == answers.kept else ''}><th scope=row>{in_html(name)}</th>"
        f"<td class=text>{_choice(answers, row, index)}</td>"
        f"<td>{100 * float(answers.confidence_MN[row, index]):.1f}%</td></tr>"
        for row, name in enumerate(answers.names)
    )
    return (
        f"<li>{picture}<div>label <strong>{in_html(label)}</strong> <small>(image {index:,})</small></div>"
        f"<table><thead><tr><th scope=col>network</th><th scope=col class=text>says</th>"
        f"<th scope=col>confidence</th></tr></thead><tbody>{said}</tbody></table></li>"
    )


def _choice(answers: Answers, row: int, index: int) -> str:
    choice = int(answers.choice_MN[row, index])
    if choice < 0:
        return "no answer"
    text = in_html(answers.classes[choice])
    return f"<b>{text}</b>" if choice == int(answers.labels_N[index]) else text
