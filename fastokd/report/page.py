"""A self-contained page about runs: figures, tables, recipe, versions, cost."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError
from fastokd.host.names import in_html
from fastokd.report.find import find_runs
from fastokd.report.html_tables import as_html
from fastokd.report.plots import as_svg, draw_all, in_page, save
from fastokd.report.pools import Pool, pool_runs
from fastokd.report.results import published_table, results_table
from fastokd.report.style import STYLE
from fastokd.report.tables import Table, save_table
from fastokd.run.facts import RunFacts

CAPTIONS = {
    "loss": "The training loss on the train split, of all students of a cohort together: mean over "
    "each epoch.",
    "accuracy": "Top-1 on the test split after each measured epoch.",
    "diversity": "Mean distance between the peers' predictions on the test split (Figure 2 of the "
    "OKDDip paper).",
    "group_size": "Top-1 error on the test split after the last epoch, against the number of networks "
    "(Figure 3 of the OKDDip paper).",
    "attention": "Mean mixing weights on the test split. A row is a receiver and its source.",
}
OVER_SEEDS = {
    "loss": "Lines are means over runs, bands one standard deviation.",
    "accuracy": "Lines are means over runs, bands one standard deviation.",
    "diversity": "Lines are means over runs, bands one standard deviation.",
    "group_size": "Points are means over runs, bars one standard deviation.",
    "attention": "Means over runs.",
}


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes a page about the runs and, beside it, each figure as PNG and SVG, and each table as
    Markdown, LaTeX and CSV (``report-results.tex`` beside ``report.html``).

    Runs that differ only in their seeds are pooled to mean and deviation.

    Args:
        runs: run folders, also unfinished ones, or folders with runs at any depth.
        out: the page; by default ``report.html`` in the folder of a single run, else in the working
            directory. An existing page is replaced.

    Raises:
        UserError: no run, a run without a measured epoch, or ``out`` can't be written.
    """
    loaded = find_runs(runs)
    if out is None:
        out = loaded[0].folder / "report.html" if len(loaded) == 1 else Path("report.html")
    out = Path(out)
    pools = pool_runs(loaded)
    figures = draw_all(pools)
    found = [results_table(pools), published_table(pools)]
    tables = {table.name: table for table in found if table is not None}
    drawn = {name: as_svg(figure) for name, figure in figures.items()}
    page = _page(pools, tables, {name: in_page(svg) for name, svg in drawn.items()})
    try:
        write_durably(out, page.encode())
        for name, figure in figures.items():
            save(figure, drawn[name], out.with_name(f"{out.stem}-{name}"))
        for name, table in tables.items():
            save_table(table, out.with_name(f"{out.stem}-{name}"))
    except OSError as error:
        raise DiskError(f"{out} can't be written: {error}") from error
    return out


def _page(pools: Sequence[Pool], tables: Mapping[str, Table], figures: Mapping[str, str]) -> str:
    title = pools[0].label if len(pools) == 1 else f"{len(pools)} recipes compared"
    several = any(len(pool.runs) > 1 for pool in pools)
    captions = {
        name: f"{CAPTIONS[name]} {OVER_SEEDS[name]}" if several else CAPTIONS[name]
        for name in figures
    }
    results, *others = [
        f"<h2>{in_html(table.title)}</h2>{as_html(table)}" for table in tables.values()
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{in_html(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{in_html(title)}</h1>",
        results,
        '<div class="figures">',
        *(
            f'<figure id="{name}" role="img" aria-label="{in_html(captions[name])}">{svg}'
            f"<figcaption>{in_html(captions[name])}</figcaption></figure>"
            for name, svg in figures.items()
        ),
        "</div>",
        *others,
        "<h2>Recipes, versions, cost</h2>",
        *(_details(pool) for pool in pools),
        "</body></html>",
    ]
    return "\n".join(parts)


def _details(pool: Pool) -> str:
    folders = ", ".join(in_html(run.folder) for run in pool.runs)
    environment = RunFacts(pool.runs[0].folder).environment()
    rates = [row.get("images_per_second") for row in pool.runs[0].metrics]
    if rates := sorted(rate for rate in rates if rate):
        environment["images_per_second (median)"] = round(rates[len(rates) // 2], 1)
    facts = [json.dumps(found, indent=1) for found in (pool.recipe.to_json(), environment)]
    return (
        f"<details><summary>{in_html(pool.label)}</summary>"
        f'<p class="note">{folders}</p>'
        + "".join(f"<pre>{html.escape(text)}</pre>" for text in facts)
        + "</details>"
    )
