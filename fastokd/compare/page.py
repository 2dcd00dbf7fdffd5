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
from fastokd.report.charts import Chart, as_figure, page_of, sections_of
from fastokd.report.html_tables import as_html
from fastokd.report.many import Many
from fastokd.report.tables import Table, as_csv, as_markdown

STEM = "comparison"
HINT = (
    "Point at a mark for its numbers; buttons show and hide rows. Accuracy against cost can be dragged "
    "and zoomed (pinch, or Ctrl and the wheel); double-click to reset it."
)


def comparison_page(
    title: str,
    said: Sequence[str],
    rules: Sequence[str],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    every: Many,
    parallel: str,
    facts: Mapping[str, Any],
) -> str:
    """The page: what the tests say, charts, tables, every run with ``parallel`` (the SVG of its chart), the
    rules, and the machine's ``facts``."""
    figures = "".join(map(as_figure, charts))
    sections = {
        "Result": _listed(said, "verdicts"),
        "Figures": f'<p class="note hint">{HINT}</p><div class="figures">{figures}</div>',
        "Tables": "".join(f"<h3>{in_html(table.title)}</h3>{as_html(table)}" for table in tables),
        "Run by run": every.section("", "", parallel),
        "Rules": _listed(rules, "rules"),
        "Versions and machine": "<details><summary>environment</summary>"
        f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre></details>",
    }
    return page_of(title, sections_of(sections))


def _listed(sentences: Sequence[str], name: str) -> str:
    return f'<ul class="{name}">{"".join(f"<li>{in_html(one)}</li>" for one in sentences)}</ul>'


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
