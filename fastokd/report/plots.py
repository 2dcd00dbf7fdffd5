"""The figures of a report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastokd.checkpoint import write_durably
from fastokd.host.names import in_plot
from fastokd.report.canvas import INK, canvas, plainly
from fastokd.report.pools import EpochMetrics, Pool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")


def draw_all(pools: Sequence[Pool]) -> dict[str, Figure]:
    """The figures that can be drawn of these runs, by name.

    ``loss``, ``accuracy`` (every student's where there is one pool), ``diversity`` (OKDDip's
    Figure 2), ``group_size`` (error against the number of networks, Figure 3) and
    ``attention`` (the mixing weights over the epochs).
    """
    together = ", all students" if any(pool.recipe.students > 1 for pool in pools) else ""
    with plainly():
        drawn = {
            "loss": _curves(
                pools,
                lambda _, row: row["train"]["loss"],
                title=f"training loss{together}",
                yscale="log",
            ),
            "accuracy": _students(pools[0]) if len(pools) == 1 else _accuracy(pools),
            "diversity": _curves(
                pools,
                lambda _, row: row["test"]["diversity"] if "test" in row else None,
                title="diversity of the peers, test",
            ),
            "group_size": _group_size(pools),
            "attention": _attention(pools),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def as_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element with text and axes in the page's text colour."""
    buffer = io.StringIO()
    with plainly():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def on_white(figure: Figure) -> str:
    """The figure as a standalone ``<svg>`` element, black on white."""
    svg = as_svg(figure).replace("currentColor", "black")
    head, rest = svg.split(">", 1)
    return f'{head}><rect width="100%" height="100%" fill="white"/>{rest}'


def save(figure: Figure, path: Path) -> None:
    """Writes ``path.svg`` and ``path.png``, black on white."""
    write_durably(path.with_name(f"{path.name}.svg"), on_white(figure).encode())
    png = io.BytesIO()
    with plainly():
        figure.savefig(png, format="png", dpi=120, facecolor="white")
    write_durably(path.with_name(f"{path.name}.png"), png.getvalue())


def _plot(
    axes: Any, pool: Pool, value: Callable[[EpochMetrics], float | None], **style: Any
) -> bool:
    """Draws a mean curve with its deviation over seeds; returns False if there is no value."""
    epochs, means, deviations = pool.curve(value)
    if not epochs:
        return False
    (line,) = axes.plot(epochs, means, marker="." if len(epochs) < 3 else None, **style)
    if any(deviations):
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    return True


def _colour(index: int) -> str:
    return CYCLE[index % len(CYCLE)]


def _curves(
    pools: Sequence[Pool],
    value: Callable[[Pool, EpochMetrics], float | None],
    label: Callable[[Pool], str] = lambda pool: pool.label,
    **axes_settings: Any,
) -> Figure | None:
    """One curve for each pool; None if there is nothing to draw."""
    figure = canvas(6, 4)
    axes = figure.subplots()
    drawn = [
        _plot(axes, pool, partial(value, pool), color=_colour(index), label=in_plot(label(pool)))
        for index, pool in enumerate(pools)
    ]
    if not any(drawn):
        return None
    axes.set(xlabel="epoch", **axes_settings)
    if len(pools) > 1:
        axes.legend(fontsize="small")
    return figure


def _accuracy(pools: Sequence[Pool]) -> Figure | None:
    return _curves(
        pools,
        lambda pool, row: 100 * pool.recipe.score(row["test"]) if "test" in row else None,
        lambda pool: f"{pool.label}, {pool.reported}",
        title="test top-1, as reported (%)",
    )


def _students(pool: Pool) -> Figure:
    recipe, figure = pool.recipe, canvas(6, 4)
    axes = figure.subplots()

    for student in range(recipe.students):
        name = f"student {student}" if recipe.students > 1 else "student"
        style = {"label": name, "color": _colour(student), "linewidth": 1}
        if _who(pool, student) == "leader":
            style = {"label": "leader", "color": INK, "linewidth": 2}
        _plot(axes, pool, partial(_top1, "student_top1", student), **style)
    if recipe.students > 1:
        dashed = {"label": "ensemble", "color": "gray", "linestyle": "--"}
        _plot(axes, pool, partial(_top1, "ensemble_top1", None), **dashed)
    axes.set(title=in_plot(f"test top-1, {recipe.dataset} (%)"), xlabel="epoch")
    axes.legend(fontsize="small")
    return figure


def _top1(name: str, student: int | None, row: EpochMetrics) -> float | None:
    """The test accuracy ``name`` of an epoch in %, of one student or of all together."""
    if "test" not in row:
        return None
    found = row["test"][name]
    return 100.0 * (found if student is None else found[student])


def _group_size(pools: Sequence[Pool]) -> Figure | None:
    """Error of the last epoch over the number of networks, for methods with at least two sizes."""
    by_method: dict[str, list[Pool]] = {}
    for pool in pools:
        recipe = pool.recipe
        key = f"{recipe.method}-{recipe.sharing}, {recipe.model}, {recipe.dataset}"
        other = pool.label.removeprefix(recipe.name).replace(f" students={recipe.students}", "")
        by_method.setdefault(key + other, []).append(pool)
    figure = canvas(6, 4)
    axes = figure.subplots()
    for index, (label, members) in enumerate(by_method.items()):
        by_size = {pool.recipe.students: pool for pool in members}
        if len(by_size) < 2:
            continue
        sizes = sorted(by_size)
        samples = [by_size[size].last() for size in sizes]
        axes.errorbar(
            sizes,
            [100 - sample.mean for sample in samples],
            yerr=[sample.std or 0.0 for sample in samples],
            marker="o",
            capsize=3,
            color=_colour(index),
            label=in_plot(label),
        )
    if not axes.has_data():
        return None
    axes.set(title="test error, last epoch (%)", xlabel="networks, leader included")
    axes.legend(fontsize="small")
    return figure


def _attention(pools: Sequence[Pool]) -> Figure | None:
    """Mean mixing weights on the test set over the epochs: a row for each receiver and source."""
    shown = []
    for pool in pools:
        found: dict[int, list[Any]] = {}
        for row in (row for run in pool.runs for row in run.metrics):
            if "attention" in row.get("test", {}):
                found.setdefault(row["epoch"] + 1, []).append(row["test"]["attention"])
        if found:
            epochs = sorted(found)
            shown.append((pool, epochs, np.stack([np.mean(found[e], axis=0) for e in epochs])))
    if not shown:
        return None
    lines = max(weights_ESN[0].size for _, _, weights_ESN in shown)
    figure = canvas(6, len(shown) * (1.2 + 0.22 * lines))
    panels = figure.subplots(len(shown), squeeze=False)[:, 0]
    for axes, (pool, epochs, weights_ESN) in zip(panels, shown, strict=True):
        heard_SN = weights_ESN.any(0)  # peers have no weight for the leader
        picture = axes.imshow(
            weights_ESN[:, heard_SN].T, aspect="auto", vmin=0, vmax=1, interpolation="nearest"
        )
        step = max(1, len(epochs) // 8)
        axes.set_xticks(range(0, len(epochs), step), [str(e) for e in epochs[::step]])
        names = [f"{_who(pool, s)} to {n}" for s, n in np.argwhere(heard_SN)]
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(title=in_plot(f"who listens to whom: {pool.label}"), xlabel="epoch")
        figure.colorbar(picture, ax=axes)
    return figure


def _who(pool: Pool, student: int) -> str:
    leader = pool.recipe.has_leader and student == pool.recipe.students - 1
    return "leader" if leader else str(student)
