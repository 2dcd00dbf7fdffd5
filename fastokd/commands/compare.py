"""The command ``compare``: parsing and printing."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.options import Json, replacing, run_options
from fastokd.commands.train import FLAGS
from fastokd.errors import UserError
from fastokd.host.names import counted, on_a_line
from fastokd.recipe.settings import parse_settings
from fastokd.run.options import RunOptions

SETTINGS = {
    name: FLAGS[name]
    for name in ("epochs", "students", "batch_size", "lr", "val", "test", "image_size")
}


@replacing("flags", SETTINGS, dict)
@run_options(
    *(
        "data_root",
        "download",
        "device",
        "precision",
        "teacher",
        "engine",
        "impl",
        "loader",
        "workers",
    ),
    *("eval_every", "deterministic", "quiet"),
)
def compare(
    methods: Annotated[
        str, typer.Argument(help="METHOD[-FORM],METHOD[-FORM] (`fastokd list methods`), or all.")
    ],
    flags: dict[str, Any],
    options: RunOptions,
    model: Annotated[str, typer.Option(help="The student.")],
    dataset: Annotated[str, typer.Option(help="The data set.")],
    seeds: Annotated[str, typer.Option(help="Seeds; one run of each row for each.")] = "0,1,2,3,4",
    label_noise: Annotated[
        str, typer.Option(help="Also with these shares of wrong training labels: 0.2,0.4.")
    ] = "",
    fraction: Annotated[
        str, typer.Option(help="Also with these shares of the training images: 0.01,0.1.")
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            help="images: the same images seen; macs: also students alone that spend the "
            "methods' multiply-accumulates."
        ),
    ] = "macs",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe or FILE.toml whose schedule, optimizer, augmentation and mixing all have; by "
            "default the data set's.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Each method's own published optimizer, schedule and augmentation instead of the same for "
            "all.",
        ),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of all recipes, KEY=VALUE; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all; by default runs/compare-MODEL-DATASET.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and their cost, and train none.")
    ] = False,
    json_: Json = False,
) -> None:
    """Compare methods at equal images and at equal cost.

    Rerun the same command to finish missing runs. --out then has comparison.html, .md, .csv and .json
    beside the runs.
    """
    from fastokd.compare.comparison import compare as run
    from fastokd.compare.comparison import prepare
    from fastokd.compare.contestants import Request
    from fastokd.distributed.launch import launched
    from fastokd.host.console import console
    from fastokd.report.tables import as_rich
    from fastokd.train import train

    if launched() > 1:
        raise UserError(
            "a comparison starts several runs, and torchrun starts one: start it without torchrun"
        )
    settings = {name: value for name, value in flags.items() if value is not None}
    students = settings.pop("students", None)
    for name, values in parse_settings(set_ or []).items():
        if len(values) > 1:
            raise UserError(
                f"--set gives {name} {len(values)} values, and a comparison has one for all: give one"
            )
        if settings.setdefault(name, values[0]) != values[0]:
            raise UserError(f"{name} is given twice, with two values: leave one of them out")
    request = Request(
        methods,
        model,
        dataset,
        _numbers("seeds", seeds, int, "whole numbers, such as 0,1,2"),
        settings,
        students,
        label_noise=_numbers("label-noise", label_noise, float, "shares, such as 0.2,0.4"),
        fraction=_numbers("fraction", fraction, float, "shares, such as 0.01,0.1"),
        published=published,
        recipe=recipe,
        budget=budget,
    )
    out = out or Path("runs") / f"compare-{model}-{dataset}".replace("/", "-").replace(":", "-")
    made = prepare(request, out, dataclasses.replace(options, quiet=options.quiet or json_))
    if dry_run:
        print(json.dumps(made.to_json()) if json_ else "\n".join(_listed(made.to_json())))
        return
    done = run(made, train)
    if json_:
        print(json.dumps(done.to_json()))
    else:
        shown = console(width=None if sys.stdout.isatty() else 200)
        for table in done.tables:
            shown.print(as_rich(table))
        print(on_a_line(f"the comparison is in {out}/comparison.html, .md, .csv and .json"))
    if done.failures:
        raise UserError(
            f"{counted(len(done.failures), 'run')} of {len(made.entries)} failed, the first, "
            f"{done.failures[0].entry.run.folder}, with: {done.failures[0].why}; the same command tries "
            "them again"
        )


def _numbers(name: str, text: str, kind: Callable[[str], Any], what: str) -> tuple[Any, ...]:
    try:
        found = tuple(kind(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"--{name} is {text!r}: write {what}") from None
    if any(number < 0 for number in found):
        raise UserError(f"--{name} is {text!r}: write {what}")
    return found


def _listed(facts: dict[str, Any]) -> list[str]:
    """The lines of ``--dry-run``."""
    width = max(len(run["folder"]) for run in facts["runs"])
    lines = [
        f"{on_a_line(run['folder']):{width}}  {run['epochs']:>6} epochs  {run['images']:>13,} images  "
        f"{run['macs']:.3g} MACs  {run['state']}"
        for run in facts["runs"]
    ]
    left = sum(run["state"] != "done" for run in facts["runs"])
    total = f"{facts['images_left']:,} images, {facts['macs_left']:.3g} multiply-accumulates"
    return [*lines, *facts["notes"], f"{counted(left, 'run')} to train: {total}"]
