"""matplotlib for reports: only Agg, without global state of the caller's figures."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastokd.errors import UserError, in_one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# The colour of text and lines; a page replaces it by its text's colour, light or dark.
INK = "#010203"
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def _import_matplotlib() -> Any:
    """Imports matplotlib without MPLBACKEND: programs started by a notebook inherit it, and the
    import raises if that backend isn't installed."""
    first, asked = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib
    except Exception as error:  # a broken installation raises anything
        raise UserError(
            f"matplotlib can't be loaded ({in_one_line(error)}): install it anew"
        ) from error
    finally:
        if asked:
            os.environ["MPLBACKEND"] = asked
    if first and asked:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = asked
    return matplotlib


def canvas(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block text is drawn literally, without formulas and TeX, in :data:`INK`.

    SVGs keep text as text, so that it can be searched and uses the page's fonts. A fixed salt makes
    the bytes of an SVG reproducible.
    """
    settings: Any = {
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastokd",
        "legend.frameon": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": INK,
        "grid.alpha": 0.12,
        **dict.fromkeys(INKED, INK),
    }
    with _import_matplotlib().rc_context(settings), warnings.catch_warnings():
        for harmless in ("Glyph .* missing from", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", harmless, UserWarning)
        yield
