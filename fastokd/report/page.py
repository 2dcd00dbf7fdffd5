"""A self-contained page about runs: the result, curves, classes, cost, and how to make it again."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastokd.checkpoint import write_durably
from fastokd.data import DatasetSplits
from fastokd.errors import DiskError
from fastokd.host.names import in_html
from fastokd.measured.answers import Answers, read_answers
from fastokd.measured.cost import read_cost
from fastokd.measured.measure import measure
from fastokd.report.charts import Chart, as_figure, page_of, sections_of
from fastokd.report.classes import classes_sections
from fastokd.report.cohorts import mixing_table, sizes_table
from fastokd.report.command import command_of
from fastokd.report.curves import panels_of
from fastokd.report.find import find_runs
from fastokd.report.headline import as_facts, facts_of, headline_table
from fastokd.report.html_tables import as_html
from fastokd.report.live import HINT, chart_of
from fastokd.report.many import Many, many_of
from fastokd.report.plots import as_svg, draw_all, in_page, save
from fastokd.report.pools import Pool, pool_runs
from fastokd.report.results import published_table, results_table
from fastokd.report.steps import cost_section
from fastokd.report.tables import Table, save_table
from fastokd.run.facts import RunFacts
from fastokd.run.options import RunOptions

CAPTIONS = {
    "loss": "The training loss on the train split, of all students of a cohort together: mean over "
    "each epoch.",
    "accuracy": "Top-1 on the test split after each measured epoch.",
    "diversity": "Mean distance between the peers' predictions on the test split (Figure 2 of the "
    "OKDDip paper).",
    "lr": "The learning rate of the recipe's optimizer in each epoch.",
    "kd_weight": "The factor of the distillation's loss in each epoch.",
    "group_size": "Top-1 error on the test split after the last epoch, against the number of networks "
    "(Figure 3 of the OKDDip paper).",
    "attention": "Mean mixing weights on the test split. A row is a receiver and its source.",
}
# Figures that are only static: title, and the table of their numbers.
STATIC: dict[str, tuple[str, Callable[[Sequence[Pool]], Table]]] = {
    "group_size": ("error against the number of networks", sizes_table),
    "attention": ("mixing weights", mixing_table),
}
OVER_SEEDS = {
    **dict.fromkeys(
        ("loss", "accuracy", "diversity", "lr", "kd_weight"),
        "Lines are means over runs, bands one standard deviation.",
    ),
    "group_size": "Points are means over runs, bars one standard deviation.",
    "attention": "Means over runs.",
}


def report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    measured: bool = True,
    data: DatasetSplits | None = None,
    options: RunOptions | None = None,
) -> Path:
    """Writes a page about the runs and, beside it, each figure as PNG and SVG, and each table as
    Markdown, LaTeX and CSV (``report-results.tex`` beside ``report.html``).

    Runs that differ only in their seeds are pooled to mean and deviation.

    Args:
        runs: run folders, also unfinished ones, or folders with runs at any depth.
        out: the page; by default ``report.html`` in the folder of a single run, else in the working
            directory. An existing page is replaced.
        measured: False leaves out answers and cost that a run's folder lacks, and writes nothing there.
        data, options: of a single run, whose answers and cost are measured if its folder lacks them, as for
            :func:`fastokd.measured.measure.measure`.

    Raises:
        UserError: no run, a run without a measured epoch, or ``out`` can't be written.
    """
    loaded = find_runs(runs)
    if out is None:
        out = loaded[0].folder / "report.html" if len(loaded) == 1 else Path("report.html")
    out = Path(out)
    if measured and len(loaded) == 1:
        measure(loaded[0], data, options)
    pools = pool_runs(loaded)
    figures = draw_all(pools)
    found = [results_table(pools), published_table(pools)]
    tables = {table.name: table for table in found if table is not None}
    many = many_of(pools)
    if many is not None:
        tables["runs"] = many.table
        if figures and (parallel := many.draw()):
            figures["parallel"] = parallel
    drawn = {name: as_svg(figure) for name, figure in figures.items()}
    shown = Shown(
        pools, tables, {name: in_page(svg) for name, svg in drawn.items()}, _answers(pools), many
    )
    page = _page(shown)
    try:
        write_durably(out, page.encode())
        for name, figure in figures.items():
            save(figure, drawn[name], out.with_name(f"{out.stem}-{name}"))
        for name, table in tables.items():
            save_table(table, out.with_name(f"{out.stem}-{name}"))
    except OSError as error:
        raise DiskError(f"{out} can't be written: {error}") from error
    return out


@dataclass(frozen=True)
class Shown:
    """What a page shows: ``figures`` as SVG elements by name, and ``answers`` of the first run of each pool."""

    pools: Sequence[Pool]
    tables: Mapping[str, Table]
    figures: Mapping[str, str]
    answers: list[Answers | None]
    many: Many | None = None


def _answers(pools: Sequence[Pool]) -> list[Answers | None]:
    return [read_answers(pool.runs[0]) for pool in pools]


def _page(shown: Shown) -> str:
    pools = shown.pools
    title = pools[0].label if len(pools) == 1 else f"{len(pools)} recipes compared"
    results, *others = [
        f"<h3>{in_html(table.title)}</h3>{as_html(table)}"
        for name, table in shown.tables.items()
        if name != "runs"
    ]
    result = _headline(shown), results
    if shown.many is not None:
        result = (shown.many.section(*result, shown.figures.get("parallel", "")), "")
    charts = _charts(shown)
    curves = [chart for name, chart in charts.items() if name not in STATIC]
    cohort = [chart for name, chart in charts.items() if name in STATIC]
    answers = shown.answers[0] if len(pools) == 1 else None
    sections = {
        "Result": "".join(result),
        "Curves": _figures(curves, _origin(pools)),
        "Kept network on the test images": "" if answers is None else _classes(pools[0], answers),
        "Cohort": _figures(cohort, ""),
        "Cost of a training step": _cost(pools),
        "Papers": "".join(others),
        "How it was made": "".join(map(_details, range(len(pools)), pools)),
    }
    return page_of(title, sections_of(sections))


def _headline(shown: Shown) -> str:
    found = [
        facts_of(pool, shown.pools, None if answers is None else len(answers.labels_N))
        for pool, answers in zip(shown.pools, shown.answers, strict=True)
    ]
    if len(found) == 1:
        return as_facts(found[0])
    table = headline_table(shown.pools, found)
    return f"<h3>{in_html(table.title)}</h3>{as_html(table)}"


def _charts(shown: Shown) -> dict[str, Chart]:
    """Interactive curves, and the other figures as they are printed."""
    several = any(len(pool.runs) > 1 for pool in shown.pools)
    captions = {
        name: f"{caption} {OVER_SEEDS[name]}" if several else caption
        for name, caption in CAPTIONS.items()
    }
    charts = {
        panel.name: chart_of(panel, captions[panel.name], shown.figures[panel.name])
        for panel in (panels_of(shown.pools) if shown.figures else [])
    }
    for name, (title, table_of) in STATIC.items():
        if name in shown.figures:
            table, figure = table_of(shown.pools), shown.figures[name]
            charts[name] = Chart(name, title, captions[name], static=figure, table=table)
    return charts


def _origin(pools: Sequence[Pool]) -> str:
    files = ", ".join(f"{pool.folders}/metrics.jsonl" for pool in pools[:4])
    more = f" and of {len(pools) - 4} more recipes" if len(pools) > 4 else ""
    return f'<p class="note">The numbers of {in_html(files)}{more}. <span class="hint">{HINT}</span></p>'


def _figures(charts: Sequence[Chart], note: str) -> str:
    if not charts:
        return ""
    return f'{note}<div class="figures">{"".join(map(as_figure, charts))}</div>'


def _cost(pools: Sequence[Pool]) -> str:
    cost = read_cost(pools[0].runs[0]) if len(pools) == 1 else None
    return "" if cost is None else cost_section(cost, pools[0].runs[0])


def _classes(pool: Pool, answers: Answers) -> str:
    seed = f"<p class=note>Of the run with seed {pool.runs[0].recipe.seed}.</p>"
    return (seed if len(pool.runs) > 1 else "") + classes_sections(answers)


def _details(index: int, pool: Pool) -> str:
    """The command, the recipe and the versions of a pool."""
    folders = ", ".join(in_html(run.folder) for run in pool.runs)
    environment = RunFacts(pool.runs[0].folder).environment()
    facts = [json.dumps(found, indent=1) for found in (pool.recipe.to_json(), environment)]
    names = ("Recipe", "Versions and machine")
    return (
        f'<h3>{in_html(pool.label)}</h3><p class="note">{folders}</p>{_command(index, pool)}'
        + "".join(
            f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>"
            for name, text in zip(names, facts, strict=True)
        )
    )


def _command(index: int, pool: Pool) -> str:
    commands = [command_of(run) for run in pool.runs]
    known = [command for command in commands if command is not None]
    if len(known) < len(commands):
        return "<p>No command line gives exactly this recipe: it is in recipe.json.</p>"
    return (
        f'<pre id="command-{index}" tabindex="0">{chr(10).join(map(in_html, known))}</pre>'
        f'<button type="button" data-copies="command-{index}">Copy the command</button>'
    )
