"""The report's figures in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastokd.report.plots import as_svg, draw_all, on_white
from fastokd.report.pools import pool_runs
from fastokd.run.folder import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure that a notebook shows as the value of a cell."""

    figure: Figure

    def _repr_svg_(self) -> str:
        return on_white(as_svg(self.figure))


def pictures(*runs: Run) -> dict[str, Picture]:
    """The figures that these runs allow, by name (:func:`fastokd.report.plots.draw_all`).

    Raises:
        UserError: a run without a measured epoch; two of one recipe and seed.
    """
    return {name: Picture(figure) for name, figure in draw_all(pool_runs(runs)).items()}
