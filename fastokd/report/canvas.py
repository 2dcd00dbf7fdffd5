"""matplotlib as a report uses it: Agg alone, no state shared with a caller's figures."""

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


def _import_matplotlib() -> Any:
    """A program that a notebook starts inherits its MPLBACKEND; where that isn't installed,
    matplotlib's import raises, though nothing here is drawn by it."""
    first, asked = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib
    except Exception as error:  # an installation of any kind of brokenness
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
    """An empty figure, in inches."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def plainly() -> Iterator[None]:
    """Within it text is drawn as it is: no ``$x$`` is a formula, no TeX is asked.

    In an SVG it stays text: it can be searched, and a page prints it in its own font, which may have
    letters that matplotlib's lacks. A fixed salt makes the same figure the same bytes.
    """
    settings: Any = {
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastokd",
    }
    with _import_matplotlib().rc_context(settings), warnings.catch_warnings():
        for harmless in ("Glyph .* missing from", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", harmless, UserWarning)
        yield
