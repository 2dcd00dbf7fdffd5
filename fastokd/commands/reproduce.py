"""The command ``reproduce``: parsing and printing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.options import Json, run_options
from fastokd.errors import UserError
from fastokd.host.names import counted, on_a_line
from fastokd.recipe.settings import parse_seeds
from fastokd.run.options import RunOptions

ALL = "all"


@run_options("data_root", "download", "device", "precision", "engine", "impl", "max_steps")
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, figure3, ffsd; or `all`.")],
    options: RunOptions,
    dataset: Annotated[str | None, typer.Option(help="A data set instead of the paper's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model instead of the paper's students.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of epochs. The schedule is scaled to it.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds; one run for each.")] = "0,1,2",
    val: Annotated[
        float | None,
        typer.Option(
            help="Images held out to choose the best epoch: a number, or a fraction such as 0.1."
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Only cells whose recipe name contains this; of all, also a table.")
    ] = "",
    budget: Annotated[
        str | None, typer.Option(help="Of all: train what fits this time, such as 24h, 90m or 3d.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Of all: runs at a time; by default one for each GPU.")
    ] = None,
    drawn: Annotated[
        bool, typer.Option("--drawn", help="Of all: try each cell for a few steps on drawn images.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of all: print the plan and train nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs; by default runs/TABLE, of all runs/reproduce."),
    ] = None,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option(help="Print only the table.")] = False,
) -> None:
    """Train a table of the papers, or all; compare the numbers.

    Rerun the same command to finish missing runs. The tables are also written to --out. all shares runs
    between the tables, fits them into --budget, and may run in several processes on one folder.
    """
    from fastokd.host.console import console
    from fastokd.report.tables import as_rich, files_of, save_table
    from fastokd.reproduce.results import as_table
    from fastokd.reproduce.table import reproduce as run
    from fastokd.reproduce.wanted import Request
    from fastokd.train import train

    options = dataclasses.replace(options, quiet=quiet or json_)
    request = Request(table, tuple(parse_seeds(seeds)), dataset, model, epochs, val, only)
    if table == ALL:
        _all(request, out, options, budget, processes, drawn=drawn, dry_run=dry_run, json_=json_)
        return
    for name, given in (
        ("budget", budget),
        ("processes", processes),
        ("drawn", drawn),
        ("dry-run", dry_run),
    ):
        if given:
            raise UserError(
                f"--{name} is for all tables: write `fastokd reproduce all --only {table}`"
            )
    out = out or Path("runs") / table
    done = run(request, out, options, train)
    made = as_table(done)
    save_table(made, out / table)
    if json_:
        print(json.dumps(done.to_json()))
        return
    # 80 columns, the default where the output is no terminal, would fold the numbers.
    console(width=None if sys.stdout.isatty() else 120).print(as_rich(made))
    print(on_a_line(f"the table is in {files_of(out / table)}, beside its runs"))


def _all(
    request: Any,
    out: Path | None,
    options: RunOptions,
    budget: str | None,
    processes: int | None,
    *,
    drawn: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    from fastokd.host.console import console
    from fastokd.host.streams import say
    from fastokd.report.tables import as_rich
    from fastokd.reproduce.all_tables import Asked, everything_of, plan_of, reproduce_all

    asked = Asked(request, out, options, budget, processes, drawn)
    of = everything_of(asked, lambda text: None if options.quiet else say(on_a_line(text)))
    if dry_run:
        facts, table = plan_of(of, asked)
    else:
        facts, table = reproduce_all(of, asked)
    if json_:
        print(json.dumps(facts))
    else:
        console(width=None if sys.stdout.isatty() else 120).print(as_rich(table))
    if dry_run:
        return
    page = on_a_line(f"{of.out}/reproduction.html")
    if failed := sum(one["state"] == "failed" for one in facts["runs"].values()):
        raise UserError(f"{counted(failed, 'run')} failed: the reasons are in {page}")
    if not json_:
        print(f"every cell is in {page}, .md and .json")
