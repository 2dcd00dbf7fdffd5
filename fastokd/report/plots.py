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

# In a page they are the variables --c0 to --c7, which have other values in the dark.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
LINES = ("-", "--", ":", "-.")
# Inches: at a phone's width, letters are shown at about their size in points.
WIDTH, HEIGHT = 5.0, 3.2


def draw_all(pools: Sequence[Pool]) -> dict[str, Figure]:
    """The figures that can be drawn of these runs, by name.

    ``loss``, ``accuracy`` (every student's where there is one pool), ``diversity`` (OKDDip's
    Figure 2), ``group_size`` (error against the number of networks, Figure 3) and
    ``attention`` (the mixing weights over the epochs).
    """
    together = ", all students" if any(pool.recipe.students > 1 for pool in pools) else ""
    with plainly():
        drawn = {
            "loss": _logarithmic(
                _curves(
                    pools,
                    lambda _, row: row["train"]["loss"],
                    f"loss on train{together}",
                )
            ),
            "accuracy": _students(pools[0]) if len(pools) == 1 else _accuracy(pools),
            "diversity": _curves(
                pools,
                lambda _, row: row["test"]["diversity"] if "test" in row else None,
                "diversity of the peers on test",
            ),
            "group_size": _group_size(pools),
            "attention": _attention(pools),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def as_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, its text in :data:`INK`."""
    buffer = io.StringIO()
    with plainly():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    figure.set_layout_engine("none")  # half of the time of a drawing, and the PNG's is the same
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def in_page(svg: str) -> str:
    """The figure :func:`as_svg` for a page with its text colour and variables ``--c0``..."""
    svg = svg.replace(INK, "currentColor")
    for index, colour in enumerate(CYCLE):
        svg = svg.replace(colour, f"var(--c{index}, {colour})")
    return svg


def on_white(svg: str) -> str:
    """The figure :func:`as_svg` as a standalone ``<svg>`` element, black on white."""
    head, rest = svg.replace(INK, "black").split(">", 1)
    return f'{head}><rect width="100%" height="100%" fill="white"/>{rest}'


def save(figure: Figure, svg: str, path: Path) -> None:
    """Writes ``path.svg`` and ``path.png``, black on white; ``svg`` is :func:`as_svg` of the figure."""
    write_durably(path.with_name(f"{path.name}.svg"), on_white(svg).encode())
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


def _style(index: int) -> dict[str, str]:
    """Colour and line of a curve; each pair is used once in the first 32."""
    return {
        "color": CYCLE[index % len(CYCLE)],
        "linestyle": LINES[index // len(CYCLE) % len(LINES)],
    }


def _axes(labels: Sequence[str]) -> tuple[Figure, Any]:
    """Axes with whole numbers in x, and room below for a legend of ``labels``."""
    from matplotlib.ticker import MaxNLocator

    rows = len(labels) if max(map(len, labels), default=0) > 30 else (len(labels) + 2) // 3
    figure = canvas(WIDTH, HEIGHT + 0.2 * rows)
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True)
    return figure, axes


def _legend(figure: Figure, axes: Any) -> None:
    """Below the axes, so that it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 30 else 3
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize="small")


def _curves(
    pools: Sequence[Pool],
    value: Callable[[Pool, EpochMetrics], float | None],
    title: str,
    label: Callable[[Pool], str] = lambda pool: pool.label,
) -> Figure | None:
    """One curve for each pool; None if there is nothing to draw."""
    labels = [in_plot(label(pool)) for pool in pools]
    figure, axes = _axes(labels if len(pools) > 1 else [])
    drawn = [
        _plot(axes, pool, partial(value, pool), label=labels[index], **_style(index))
        for index, pool in enumerate(pools)
    ]
    if not any(drawn):
        return None
    axes.set(xlabel="epoch", title=title)
    if len(pools) > 1:
        _legend(figure, axes)
    return figure


def _logarithmic(figure: Figure | None) -> Figure | None:
    """The figure with a logarithmic y axis if its values, all above 0, span a factor of 10."""
    if figure is None:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    (axes,) = figure.axes
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if 0 < 10 * values.min() <= values.max():
        axes.set_yscale("log")
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            minor_locator=NullLocator(),
            major_formatter="{x:g}",
        )
    return figure


def _accuracy(pools: Sequence[Pool]) -> Figure | None:
    return _curves(
        pools,
        lambda pool, row: 100 * pool.recipe.score(row["test"]) if "test" in row else None,
        "top-1 on test, as reported (%)",
        lambda pool: f"{pool.label}, {pool.reported}",
    )


def _students(pool: Pool) -> Figure:
    recipe = pool.recipe
    names = [_who(pool, s) for s in range(recipe.students)]
    alone = recipe.students == 1
    labels = ["student"] if alone else [n if n == "leader" else f"student {n}" for n in names]
    figure, axes = _axes([*labels, "ensemble"])
    for student, label in enumerate(labels):
        style: dict[str, Any] = {"linewidth": 1, **_style(student)}
        if label == "leader":
            style = {"color": INK, "linewidth": 2}
        _plot(axes, pool, partial(_top1, "student_top1", student), label=label, **style)
    if not alone:
        dashed = {"label": "ensemble", "color": "gray", "linestyle": "--"}
        _plot(axes, pool, partial(_top1, "ensemble_top1", None), **dashed)
    axes.set(title=in_plot(f"top-1 on test, {recipe.dataset} (%)"), xlabel="epoch")
    _legend(figure, axes)
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
    by_method = {
        label: members
        for label, members in by_method.items()
        if len({pool.recipe.students for pool in members}) > 1
    }
    if not by_method:
        return None
    figure, axes = _axes([in_plot(label) for label in by_method])
    for index, (label, members) in enumerate(by_method.items()):
        by_size = {pool.recipe.students: pool for pool in members}
        sizes = sorted(by_size)
        samples = [by_size[size].last() for size in sizes]
        axes.errorbar(
            sizes,
            [100 - sample.mean for sample in samples],
            yerr=[sample.std or 0.0 for sample in samples],
            marker="o",
            capsize=3,
            label=in_plot(label),
            **_style(index),
        )
    axes.set(title="top-1 error on test, last epoch (%)", xlabel="networks, leader included")
    _legend(figure, axes)
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
    # Inches; peers have no weight for the leader.
    heights = [0.8 + 0.19 * weights_ESN.any(0).sum() for _, _, weights_ESN in shown]
    figure = canvas(WIDTH, sum(heights) + 0.3 * len(shown))
    panels = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (pool, epochs, weights_ESN) in zip(panels, shown, strict=True):
        heard_SN = weights_ESN.any(0)
        picture = axes.imshow(
            weights_ESN[:, heard_SN].T, aspect="auto", vmin=0, vmax=1, interpolation="nearest"
        )
        ticks = _round_epochs(epochs)
        axes.set_xticks([epochs.index(epoch) for epoch in ticks], map(str, ticks))
        names = [f"{_who(pool, s)} to {n}" for s, n in np.argwhere(heard_SN)]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"mixing weights on test\n{in_plot(pool.label)}", fontsize=9)
        axes.set_xlabel("epoch")
        figure.colorbar(picture, ax=axes)
    return figure


def _round_epochs(epochs: Sequence[int]) -> Sequence[int]:
    """At most some eight of the epochs, round ones where they are among them."""
    from matplotlib.ticker import MaxNLocator

    steps = MaxNLocator(8, integer=True, min_n_ticks=1).tick_values(epochs[0], epochs[-1])
    found = [epoch for epoch in epochs if epoch in steps]
    return found if len(found) > 1 else epochs[:: max(1, len(epochs) // 8)]


def _who(pool: Pool, student: int) -> str:
    leader = pool.has_leader and student == pool.recipe.students - 1
    return "leader" if leader else str(student)
