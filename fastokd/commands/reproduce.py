"""The command ``reproduce``: parsing and printing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastokd.commands.options import Json, run_options
from fastokd.host.names import on_a_line
from fastokd.recipe.settings import parse_seeds
from fastokd.run.options import RunOptions


@run_options("data_root", "download", "device", "precision", "engine", "impl", "max_steps")
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, figure3 or ffsd.")],
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
    only: Annotated[str, typer.Option(help="Only cells whose recipe name contains this.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/TABLE.")
    ] = None,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option(help="Print only the table.")] = False,
) -> None:
    """Train a table of the papers; compare its numbers.

    Rerun the same command to finish missing runs. The table is also written to --out as Markdown,
    LaTeX and CSV.
    """
    from fastokd.host.console import console
    from fastokd.report.tables import as_rich, files_of, save_table
    from fastokd.reproduce.results import as_table
    from fastokd.reproduce.table import reproduce as run
    from fastokd.reproduce.wanted import Request
    from fastokd.train import train

    request = Request(table, tuple(parse_seeds(seeds)), dataset, model, epochs, val, only)
    options = dataclasses.replace(options, quiet=quiet or json_)
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
