"""Interactive charts in a self-contained page: Vega-Lite specifications and what draws them.

:func:`page_of` makes the page, :func:`as_figure` one figure of it. The libraries (Vega, Vega-Lite and Vega
Embed, of the package vl-convert-python) are inlined once a page. Vega's interpreter of expressions is used, which
needs no ``eval``, so the page's Content-Security-Policy allows only the scripts in it, by their hashes.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.host.caches import cache_root
from fastokd.host.names import in_html
from fastokd.report.html_tables import SCRIPT, as_html
from fastokd.report.style import CHARTS, STYLE, digest
from fastokd.report.tables import Table

# Where an SVG names an element or refers to it; several figures of a page use the same names.
_IDS = re.compile(r'(\bid="|href="#|url\(#)')
# Colours are the page's variables and its text's colour, so that they follow its scheme.
_FAINT = {"gridColor": "currentColor", "gridOpacity": 0.12, "domainColor": "currentColor"}
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "style": {"guide-label": {"fill": "currentColor"}, "guide-title": {"fill": "currentColor"}},
    "axis": {
        **_FAINT,
        "tickColor": "currentColor",
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "domainOpacity": 0.5,
        "tickOpacity": 0.5,
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor"},
    "title": {"color": "currentColor"},
    "text": {"color": "currentColor"},
    "view": {"stroke": None},
}

# The dashes of `report.plots.LINES` in CSS and in pixels.
DASHES: dict[str, tuple[str, list[int]]] = {
    "-": ("solid", []),
    "--": ("dashed", [6, 3]),
    ":": ("dotted", [1, 3]),
    "-.": ("double", [6, 3, 1, 3]),
}


@dataclass(frozen=True)
class Series:
    """A button that shows and hides what has ``key`` in a chart's parameter ``hidden``.

    ``colour``: of CSS. ``dash``: the style of its line in CSS, such as ``"dashed"``.
    """

    key: str
    label: str
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Chart:
    """A figure of a page: interactive, static for print and without JavaScript, and as numbers.

    Attributes:
        name: its id in the page.
        spec: Vega-Lite; :func:`responsive` gives it the page's width.
        static: an ``<svg>`` element, or "".
        series: has a button each, if there are several.
        table: the numbers that are drawn, which the page folds away.
        wide: takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any] | None = None
    static: str = ""
    series: Sequence[Series] = ()
    table: Table | None = None
    wide: bool = False


def responsive(spec: Mapping[str, Any], height: int) -> dict[str, Any]:
    """A single or layered specification as wide as the page, ``height`` pixels high."""
    fit = {"type": "fit", "contains": "padding", "resize": True}
    return {**spec, "width": "container", "height": height, "autosize": fit, "background": None}


def quiet(description: str) -> dict[str, Any]:
    """The part of a specification by which a screen reader reads one sentence instead of every mark."""
    return {"description": description, "config": {"mark": {"aria": False}}}


def as_figure(chart: Chart) -> str:
    """The chart as a ``<figure>`` with its heading, buttons, caption and numbers."""
    name, caption = in_html(chart.name), in_html(chart.caption)
    classes = " ".join(["chart"] * (chart.spec is not None) + ["wide"] * chart.wide)
    parts = [
        f'<figure id="{name}" class="{classes}" aria-labelledby="{name}-title">',
        f'<h3 id="{name}-title">{in_html(chart.title)}</h3>',
    ]
    if chart.static:
        own = _IDS.sub(rf"\1{name}-", chart.static)
        parts.append(f'<div class="static" role="img" aria-label="{caption}">{own}</div>')
    if chart.spec is not None:
        parts.append(
            f'<div class="live"></div>{_buttons(chart.series)}'
            f'<script type="application/json">{in_script(chart.spec)}</script>'
        )
    parts.append(f"<figcaption>{caption}</figcaption>")
    if chart.table is not None:
        parts.append(
            f'<details class="data"><summary>The numbers</summary>{as_html(chart.table)}</details>'
        )
    return "\n".join([*parts, "</figure>"])


def _buttons(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-series="{in_html(one.key)}">'
        f'<span class="swatch" style="border-top: 3px {one.dash} {one.colour}"></span>'
        f"{in_html(one.label)}</button>"
        for one in series
    )
    return f'<div class="legend" role="group" aria-label="Shown curves">{buttons}</div>'


def in_script(values: object) -> str:
    """JSON for a ``<script>`` element; no text in it can end the element. Numbers that aren't finite are null."""
    text = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def short(value: float | None) -> float | None:
    """With 8 digits; None if it isn't finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")


def sections_of(sections: Mapping[str, str]) -> str:
    """The sections of a page by their headings; empty ones are left out."""
    return "\n".join(
        f'<section aria-labelledby="section-{index}"><h2 id="section-{index}">{name}</h2>\n{content}'
        "</section>"
        for index, (name, content) in enumerate(sections.items())
        if content
    )


def page_of(title: str, body: str, *, scripts: Sequence[str] = (), last: Sequence[str] = ()) -> str:
    """The whole page. ``body`` is HTML; the libraries are in it where it has a chart.

    Args:
        scripts: further JavaScript, which runs before the charts are drawn, as does that of tables.
        last: and after; ``await drawn`` in it waits for the charts.
    """
    drawn = 'class="chart' in body
    own = files("fastokd.report").joinpath("charts.js")
    scripts = [*scripts, *([SCRIPT] if "<table" in body else [])]
    run = [*scripts, *([libraries(), own.read_text("utf-8")] if drawn else []), *last]
    allowed = " ".join(map(digest, run)) or "'none'"
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src {allowed}"
    )
    config = f'<script type="application/json" id="chart-config">{in_script(CONFIG)}</script>'
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{in_html(title)}</title><style>{STYLE}{CHARTS}</style></head><body>",
            '<a class="skip" href="#main">Skip to the content</a>',
            f'<main id="main"><h1>{in_html(title)}</h1>',
            f"{body}</main>",
            config if drawn else "",
            *(f"<script>{text}</script>" for text in run),
            "</body></html>",
        ]
    )


@functools.cache
def libraries() -> str:
    """Vega, Vega-Lite and Vega Embed as one script, some 0.9 MB.

    Bundling takes seconds, so the script is kept in the cache folder. Its first line there is a checksum of
    the rest, so that a damaged file is made again.
    """
    import vl_convert

    kept = cache_root() / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, UnicodeDecodeError):
        check, _, text = kept.read_bytes().decode().partition("\n")
        if check == f"// {digest(text)}":
            return text
    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace(
        "</script", "<\\/script"
    )
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_durably(kept, f"// {digest(text)}\n{text}".encode())
    return text
