"""The figures of a report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastokd.checkpoint import write_durably
from fastokd.host.names import in_plot
from fastokd.report.canvas import INK, canvas, plainly
from fastokd.report.cohorts import mixing_of, sizes_of
from fastokd.report.curves import Panel, panels_of
from fastokd.report.pools import Pool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In a page they are the variables --c0 to --c7, which have other values in the dark.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
LINES = ("-", "--", ":", "-.")
# Inches: at a phone's width, letters are shown at about their size in points.
WIDTH, HEIGHT = 5.0, 3.2
_KINDS: dict[str, dict[str, Any]] = {
    "leader": {"color": INK, "linewidth": 2, "linestyle": "-"},
    "ensemble": {"color": "gray", "linestyle": "--"},
}


def draw_all(pools: Sequence[Pool]) -> dict[str, Figure]:
    """The figures that can be drawn of these runs, by name.

    Those of :func:`fastokd.report.curves.panels_of`, ``group_size`` (error against the number of networks,
    OKDDip's Figure 3) and ``attention`` (the mixing weights over the epochs).
    """
    with plainly():
        drawn = {
            **{panel.name: _panel(panel) for panel in panels_of(pools)},
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
    for colour in CYCLE:
        svg = svg.replace(colour, in_variables(colour))
    return svg


def in_variables(colour: str) -> str:
    """A colour of :data:`CYCLE` for a page's style."""
    return f"var(--c{CYCLE.index(colour)}, {colour})"


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


def _panel(panel: Panel) -> Figure:
    """Mean curves with their deviations over seeds as bands."""
    labels = [in_plot(curve.label) for curve in panel.curves]
    several = len(labels) > 1
    figure, axes = _axes(labels if several else [])
    for curve, label in zip(panel.curves, labels, strict=True):
        style = {**_style(curve.index), **_KINDS.get(curve.kind, {}), "label": label}
        marker = "." if len(curve.epochs) < 3 else None
        axes.plot(curve.epochs, curve.means, marker=marker, **style)
        if any(curve.deviations):
            pairs = list(zip(curve.means, curve.deviations, strict=True))
            low, high = [m - d for m, d in pairs], [m + d for m, d in pairs]
            axes.fill_between(curve.epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", title=in_plot(panel.heading))
    if panel.logarithmic:
        _logarithmic(axes)
    if several:
        _legend(figure, axes)
    return figure


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


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        minor_locator=NullLocator(),
        major_formatter="{x:g}",
    )


def _group_size(pools: Sequence[Pool]) -> Figure | None:
    """Error of the last epoch over the number of networks, for methods with at least two sizes."""
    found = sizes_of(pools)
    if not found:
        return None
    figure, axes = _axes([in_plot(sizes.label) for sizes in found])
    for index, (label, errors) in enumerate(found):
        axes.errorbar(
            list(errors),
            [error.mean for error in errors.values()],
            yerr=[error.std or 0.0 for error in errors.values()],
            marker="o",
            capsize=3,
            label=in_plot(label),
            **_style(index),
        )
    axes.set(title="top-1 error on test, last epoch (%)", xlabel="networks, leader included")
    _legend(figure, axes)
    return figure


# Of many pools the first are drawn; the table has all.
MIXING_DRAWN = 8


def _attention(pools: Sequence[Pool]) -> Figure | None:
    """Mean mixing weights on the test set over the epochs: a row for each receiver and source."""
    found = mixing_of(pools)[:MIXING_DRAWN]
    if not found:
        return None
    heights = [0.8 + 0.19 * len(mixing.names) for mixing in found]  # inches
    figure = canvas(WIDTH, sum(heights) + 0.3 * len(found))
    panels = figure.subplots(len(found), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (pool, epochs, names, weights_ER) in zip(panels, found, strict=True):
        picture = axes.imshow(weights_ER.T, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        ticks = _round_epochs(epochs)
        axes.set_xticks([epochs.index(epoch) for epoch in ticks], map(str, ticks))
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
