"""A comparison's page, self-contained, and its files."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError
from fastokd.host.names import in_html, in_markdown
from fastokd.report.html_tables import as_html
from fastokd.report.plots import as_svg, in_page
from fastokd.report.style import STYLE
from fastokd.report.tables import Table, as_csv, as_markdown

CAPTIONS = {
    "accuracy": "Test top-1 of the kept student after the last epoch: the mean over seeds with its 95% "
    "interval, and each seed as a stroke. Methods are blue, students alone orange.",
    "cost": "The same against the multiply-accumulates that a run's training spends, with 95% intervals.",
    "reliability": "The kept student's accuracy against its confidence on the test images, in 15 bins of "
    "all seeds together. On the thin line both are equal.",
    "noise": "The same accuracy with wrong training labels, with 95% intervals; the test labels are right.",
    "fraction": "The same accuracy with fewer training images and as many images seen, with 95% intervals.",
}
STEM = "comparison"


def page_of(
    title: str,
    rules: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    """The page: rules, figures, tables, and the machine's ``facts``."""
    listed = "".join(f"<li>{in_html(rule)}</li>" for rule in rules)
    drawn = "".join(
        f'<figure id="{name}" role="img" aria-label="{in_html(CAPTIONS[name])}">{in_page(as_svg(figure))}'
        f"<figcaption>{in_html(CAPTIONS[name])}</figcaption></figure>"
        for name, figure in figures.items()
    )
    written = "".join(f"<h2>{in_html(table.title)}</h2>{as_html(table)}" for table in tables)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{in_html(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{in_html(title)}</h1>",
            f'<h2>Rules</h2><ul class="rules">{listed}</ul>',
            f'<div class="figures">{drawn}</div>',
            written,
            "<h2>Versions and machine</h2>",
            f"<details><summary>environment</summary><pre>{html.escape(json.dumps(facts, indent=1))}"
            "</pre></details>",
            "</body></html>",
        ]
    )


def write_files(
    out: Path, title: str, rules: Sequence[str], tables: Sequence[Table], page: str, facts: Any
) -> None:
    """Writes ``comparison.html``, ``.json``, ``.md`` and ``.csv``; existing files are replaced.

    Raises:
        DiskError: one can't be written.
    """
    listed = "\n".join(f"- {in_markdown(rule)}" for rule in rules)
    markdown = f"# {in_markdown(title)}\n\n{listed}\n\n" + "\n".join(
        as_markdown(table) for table in tables
    )
    csv = "\n".join(f"{table.title}\n{as_csv(table)}" for table in tables)
    texts = {"html": page, "json": json.dumps(facts, indent=1) + "\n", "md": markdown, "csv": csv}
    try:
        for suffix, text in texts.items():
            write_durably(out / f"{STEM}.{suffix}", text.encode())
    except OSError as error:
        raise DiskError(f"{out / STEM} can't be written: {error}") from error
