"""The command ``train``: nothing but parsing and printing."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from fastokd.commands.options import replacing, run_options
from fastokd.errors import UserError
from fastokd.host.names import on_a_line
from fastokd.host.streams import say
from fastokd.recipe import names
from fastokd.recipe.settings import WantedRun, parse_seeds, parse_settings, wanted_runs
from fastokd.run.options import RunOptions

# The settings of a recipe that have an option of their own; ``--set`` has the others.
FLAGS = {
    "epochs": (Annotated[int | None, "Epochs; the schedule scales."], None),
    "seed": (Annotated[int | None, "Weights, order and augmentation."], None),
    "students": (Annotated[int | None, "Networks, leader included."], None),
    "batch_size": (Annotated[int | None, "Images a step."], None),
    "lr": (Annotated[float | None, "Learning rate of the first epoch."], None),
    "temperature": (Annotated[float | None, "T of the distillation."], None),
    "method": (
        Annotated[str | None, "A method of your own in the recipe's: package.module:Class."],
        None,
    ),
    "val": (Annotated[int | None, "Images held out of train."], None),
    "image_size": (Annotated[int | None, "Height and width, of an imagefolder."], None),
}


@replacing("flags", FLAGS, dict)
@run_options()
def train(
    recipe: Annotated[str, typer.Argument(help="METHOD/MODEL/DATASET; `fastokd list recipes`.")],
    flags: dict[str, Any],
    options: RunOptions,
    seeds: Annotated[str | None, typer.Option(help="Several runs: 0,1,2.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of recipe or method, KEY=VALUE[,VALUE]; repeatable."),
    ] = None,
    scale_lr: Annotated[
        bool, typer.Option(help="The rate times the batch over the recipe's own batch.")
    ] = False,
    print_recipe: Annotated[bool, typer.Option(help="Print the recipe and stop.")] = False,
) -> None:
    """Train a cohort by a recipe and leave a run folder.

    With several --seeds, or several values to a --set: a folder for each run and an index; the same
    command again goes on with what is missing.
    """
    from fastokd.distributed.launch import launched, of_the_first_rank
    from fastokd.run.sweep import run_all, sweep_folder
    from fastokd.train import train as run

    several = None if seeds is None else parse_seeds(seeds)
    settings = parse_settings(set_ or [])
    wanted = wanted_runs(recipe, flags, settings, seeds=several, scale_lr=scale_lr)
    if print_recipe:
        for entry in wanted:
            print(json.dumps(entry.recipe.to_json(), indent=1))
        return
    if not of_the_first_rank():
        options = dataclasses.replace(options, quiet=True)
    if not options.quiet:
        for line in _what_was_scaled(recipe, wanted, scale_lr):
            say(line)
    if len(wanted) == 1 and seeds is None:
        done = run(wanted[0].recipe, options)
        if not options.quiet:
            say(f"the run is in {on_a_line(done.folder)}")
        return
    if launched() > 1:
        raise UserError(
            f"{len(wanted)} runs are asked for, and torchrun starts one: leave --seeds and lists of "
            "values out, or start them one after another"
        )
    folder = options.out or sweep_folder(recipe)
    run_all(folder, wanted, options, run)
    if not options.quiet:
        say(f"the {len(wanted)} runs are in {on_a_line(folder)}, listed in its index.json")


def _what_was_scaled(name: str, wanted: list[WantedRun], scale_lr: bool) -> list[str]:
    """A line for each rate that follows its batch, and each schedule that follows its epochs."""
    lines = []
    for resolved in (entry.recipe for entry in wanted):
        if scale_lr:
            lines.append(f"lr {resolved.lr:g}, scaled for batches of {resolved.batch_size}")
        if resolved.epochs != names.recipe(name).epochs:
            lines.append(
                f"schedule for {resolved.epochs} epochs: rate / {1 / resolved.lr_decay:g} before "
                f"epochs {list(resolved.milestones)}, ramp over {resolved.ramp_epochs:g}"
            )
    return list(dict.fromkeys(lines))
