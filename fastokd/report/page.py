"""A self-contained page about runs: figures, tables, recipe, versions, cost."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from fastokd.checkpoint import write_durably
from fastokd.errors import DiskError, UserError
from fastokd.host.names import in_html
from fastokd.recipe.cells import cells_of, tables
from fastokd.recipe.names import recipe
from fastokd.report.plots import as_svg, draw_all, save
from fastokd.report.pools import Pool, pool_runs
from fastokd.report.published import altered
from fastokd.report.statistics import Sample, welch
from fastokd.run.facts import RunFacts
from fastokd.run.folder import Run
from fastokd.run.summary import summarise

CAPTIONS = {
    "loss": "The loss that is trained, of all students of a cohort together.",
    "accuracy": "Accuracy on the test set after each measured epoch; a band is one deviation over "
    "seeds.",
    "diversity": "Mean distance between the peers' predictions (Figure 2 of the OKDDip paper).",
    "group_size": "Error against the size of the group (Figure 3 of the OKDDip paper).",
    "attention": "Mean mixing weights on the test set. A row is who listens, to whom.",
}
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure svg { width: 100%; height: auto; }
figcaption, .note { font-size: .9rem; opacity: .8; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; font-size: .85rem; }
@media print { body { max-width: none; } details > * { display: block; } }
"""


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes a page about the runs and, beside it, each of its figures as PNG and SVG.

    Runs that differ only in their seeds are pooled to mean and deviation.

    Args:
        runs: run folders, also unfinished ones, or folders of several runs (a sweep's).
        out: the page; by default ``report.html`` in the folder of a single run, else in the working
            directory. An existing page is replaced.

    Raises:
        UserError: no run, a run without a measured epoch, or ``out`` can't be written.
    """
    loaded = [run for path in runs for run in _load(Path(path))]
    if not loaded:
        raise UserError("no run was named: give at least one run folder")
    if out is None:
        out = loaded[0].folder / "report.html" if len(loaded) == 1 else Path("report.html")
    out = Path(out)
    pools = pool_runs(loaded)
    figures = draw_all(pools)
    page = _page(pools, {name: as_svg(figure) for name, figure in figures.items()})
    try:
        write_durably(out, page.encode())
        for name, figure in figures.items():
            save(figure, out.with_name(f"{out.stem}-{name}"))
    except OSError as error:
        raise DiskError(f"{out} can't be written: {error}") from error
    return out


def _load(path: Path) -> list[Run]:
    """The run in a folder, or the runs in its subfolders."""
    if (path / "recipe.json").is_file():
        return [Run.load(path)]
    below = sorted(path.glob("*/recipe.json")) if path.is_dir() else []
    if not below:
        raise UserError(f"there is no run in {path}: name a folder that `fastokd train` left")
    return [Run.load(file.parent) for file in below]


def _page(pools: Sequence[Pool], figures: dict[str, str]) -> str:
    title = pools[0].label if len(pools) == 1 else f"{len(pools)} recipes compared"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{in_html(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{in_html(title)}</h1>",
        _results(pools),
        '<div class="figures">',
        *(
            f'<figure id="{name}" role="img" aria-label="{in_html(CAPTIONS[name])}">{svg}'
            f"<figcaption>{in_html(CAPTIONS[name])}</figcaption></figure>"
            for name, svg in figures.items()
        ),
        "</div>",
        _published(pools),
        *(_details(pool) for pool in pools),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _table(identity: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{in_html(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table id="{identity}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _results(pools: Sequence[Pool]) -> str:
    rows = []
    for pool in pools:
        recipe = pool.recipe
        ensemble = pool.of_last(lambda row: 100 * row["test"]["ensemble_top1"])
        diversity = pool.of_last(lambda row: row["test"]["diversity"])
        seconds = Sample.of([sum(row["seconds"] for row in run.metrics) for run in pool.runs])
        rows.append(
            (
                pool.label,
                f"{recipe.students} x {recipe.model}",
                recipe.dataset,
                f"{_epochs(pool)} of {recipe.epochs}",
                len(pool.runs),
                pool.reported,
                pool.last(),
                pool.best(),
                "" if ensemble is None or recipe.students == 1 else ensemble,
                "" if diversity is None else f"{diversity.mean:.3f}",
                f"{seconds.mean:,.0f} s",
            )
        )
    head = ["recipe", "networks", "data", "epochs", "runs", "reported", "last epoch (%)"]
    head += ["best epoch (%)", "ensemble (%)", "diversity", "training"]
    on_val = summarise(pools[0].runs[0]).best_on == "val"
    how = "on held-out images" if on_val else "on the test set, as the papers did it"
    note = (
        '<p class="note">Top-1 on the test set, mean ± deviation over runs. The best epoch is '
        f"chosen {how}.</p>"
    )
    return "<h2>Results</h2>" + _table("results", head, rows) + note


def _epochs(pool: Pool) -> int:
    return min(run.standing.epochs for run in pool.runs)


def _published(pools: Sequence[Pool]) -> str:
    """The papers' cells of these recipes with our results, and all differences of the runs."""
    rows = []
    cells = [cell for table in tables() for cell in cells_of(table) if cell.mean is not None]
    for pool in pools:
        for cell in cells:
            if cell.recipe != pool.recipe.name:
                continue
            theirs = Sample(cell.mean or 0.0, cell.std, cell.runs)
            best = pool.best()
            if cell.unit == "error":
                best = Sample(100 - best.mean, best.std, best.runs)
            otherwise = altered(cell, pool.recipe, pool.runs)
            if otherwise is None:
                continue
            rows.append(
                (
                    f"{cell.table}, {cell.row}, {cell.column}",
                    cell.unit,
                    f"{_epochs(pool)} of {recipe(cell.recipe).epochs}",
                    best,
                    theirs,
                    welch(best, theirs),
                    f"no reproduction: {', '.join(otherwise)}" if otherwise else "",
                )
            )
    if not rows:
        return ""
    head = ("cell", "in %", "epochs", "ours, best epoch", "published", "difference", "")
    return "<h2>Beside the papers</h2>" + _table("published", head, rows)


def _details(pool: Pool) -> str:
    folders = ", ".join(in_html(run.folder) for run in pool.runs)
    environment = RunFacts(pool.runs[0].folder).environment()
    rates = [row.get("images_per_second") for row in pool.runs[0].metrics]
    if rates := sorted(rate for rate in rates if rate):
        environment["images_per_second (median)"] = round(rates[len(rates) // 2], 1)
    facts = [json.dumps(found, indent=1) for found in (pool.recipe.to_json(), environment)]
    return (
        f"<details><summary>{in_html(pool.label)}: recipe, versions, cost</summary>"
        f'<p class="note">{folders}</p>'
        + "".join(f"<pre>{html.escape(text)}</pre>" for text in facts)
        + "</details>"
    )
