"""The commands ``runs``, ``clean`` and ``watch``: many runs listed, removed, shown while they go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastokd.commands.options import Json
from fastokd.errors import UserError, warn
from fastokd.host.names import counted, on_a_line

Folders = Annotated[
    list[Path] | None,
    typer.Argument(help="Runs, or folders with runs at any depth; by default runs/."),
]
Pattern = Annotated[
    str | None, typer.Option("--recipe", help="Only runs of these recipes: 'okddip*/resnet32/*'.")
]


def runs(
    folders: Folders = None,
    sort: Annotated[
        str,
        typer.Option(
            help="run, recipe, seed, epoch, top-1, state, age or size; -size: largest first."
        ),
    ] = "run",
    state: Annotated[
        str | None, typer.Option(help="Only these: running,finished,interrupted,failed.")
    ] = None,
    recipe: Pattern = None,
    json_: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """List runs: recipe, seed, epoch, top-1, state, age, size."""
    from fastokd.overview import columns
    from fastokd.overview.listing import list_runs

    if json_ and csv:
        raise UserError("--json and --csv are two formats: choose one")
    found = columns.chosen(list_runs(_tops(folders)), states=state, recipe=recipe)
    found = columns.in_order(found, sort)
    if json_ or csv:
        text = json.dumps(columns.as_rows(found)) + "\n" if json_ else columns.in_csv(found)
        print(text, end="")
        return
    if found:
        columns.print_table(found)
    for run in found:
        if run.reason:
            print(on_a_line(f"{run.folder}: {run.reason}"))
    print(columns.counts(found))


def clean(
    folders: Folders = None,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Checkpoints of finished runs; their students stay."),
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Runs that were interrupted, with all their files.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Runs that can't be read, with all their files.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every run that isn't running, with all its files.")
    ] = False,
    older_than: Annotated[
        str | None, typer.Option(help="Only where the run last wrote so long ago: 7d, 12h.")
    ] = None,
    recipe: Pattern = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and stop.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove checkpoints or runs, after showing which.

    A run that is running is never removed, and links are never followed. A run without its checkpoints
    can still be reported and exported.
    """
    from fastokd.overview import columns
    from fastokd.overview.clean import Asked, plan, remove_all, said
    from fastokd.overview.listing import list_runs
    from fastokd.run.durations import seconds_of

    if not (checkpoints or unfinished or failed or every):
        raise UserError(
            "clean removes only what is asked for: add --checkpoints, --unfinished, --failed or --all"
        )
    seconds = 0.0 if older_than is None else seconds_of(older_than, "--older-than")
    found = columns.chosen(list_runs(_tops(folders), links=False), recipe=recipe)
    removals, kept = plan(found, Asked(checkpoints, unfinished, failed, every, seconds))
    for folder, why in kept.items():
        print(on_a_line(f"{folder} stays: {why}"))
    if not removals:
        print("there is nothing to remove")
        return
    names = ("run", "state", "age")
    cells = {name: [columns.COLUMNS[name].text(one.run) for one in removals] for name in names}
    cells["removed"] = [one.what for one in removals]
    cells["size"] = [columns.in_bytes(one.bytes) for one in removals]
    columns.print_cells(cells)
    if dry_run:
        print(f"would remove {said(removals)}")
    elif yes or _agreed(f"remove {said(removals)}? [y/N] "):
        left = remove_all(removals)
        print(f"removed {said([one for one in removals if one.run.folder not in left])}")
        for folder, why in left.items():
            warn(f"{folder} stays: {why}")
        if left:
            raise UserError(
                f"{counted(len(left), 'run')} couldn't be removed: run the same command again"
            )
    else:
        print("nothing was removed")


def _tops(folders: list[Path] | None) -> list[Path]:
    """The folders to look into; runs/ needn't be there yet."""
    if folders:
        return folders
    return [Path("runs")] if Path("runs").exists() else []


def _agreed(question: str) -> bool:
    """Asks on the terminal.

    Raises:
        UserError: there is none.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError("nothing was removed, as there is no terminal to ask on: add --yes")
    print(question, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def watch(
    folders: Folders = None,
    port: Annotated[int, typer.Option(help="The port; by default a free one.")] = 0,
    host: Annotated[
        str,
        typer.Option(help="The address to listen on; others than this machine's are warned of."),
    ] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in a browser while they go on.

    Serves a list of the runs and the report of each, which are updated when an epoch ends. It writes
    nothing into the runs. ^C ends it.
    """
    from fastokd.overview.listing import check_folders
    from fastokd.overview.watch import serve

    check_folders(folders or [])
    serve(folders or [Path("runs")], host, port, in_browser=open_)  # runs/ may be made later
