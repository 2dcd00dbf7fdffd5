"""The command ``train``: parsing and printing."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from fastokd.commands.options import replacing, run_options
from fastokd.errors import UserError
from fastokd.host.names import counted, on_a_line
from fastokd.host.streams import say
from fastokd.recipe import names
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.settings import WantedRun, parse_seeds, parse_settings, wanted_runs
from fastokd.run.options import RunOptions

# Settings of a recipe that have their own option; ``--set`` sets the others.
FLAGS = {
    "epochs": (Annotated[int | None, "Epochs; the schedule is scaled."], None),
    "seed": (Annotated[int | None, "Seed of weights, order and augmentation."], None),
    "students": (Annotated[int | None, "Number of networks, leader included."], None),
    "batch_size": (Annotated[int | None, "Images a step."], None),
    "lr": (Annotated[float | None, "Learning rate of the first epoch."], None),
    "temperature": (Annotated[float | None, "Temperature of the distillation."], None),
    "method": (
        Annotated[str | None, "Your own method in place of the recipe's: package.module:Class."],
        None,
    ),
    "val": (Annotated[int | None, "Images held out of the training set."], None),
    "image_size": (Annotated[int | None, "Height and width of an imagefolder's images."], None),
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
        typer.Option(
            "--set", help="A setting of recipe, method or model, KEY=VALUE[,VALUE]; repeatable."
        ),
    ] = None,
    scale_lr: Annotated[
        bool,
        typer.Option(
            help="Scale the learning rate by the batch size over the recipe's batch size."
        ),
    ] = False,
    print_recipe: Annotated[bool, typer.Option(help="Print the recipe and stop.")] = False,
) -> None:
    """Train a cohort by a recipe and leave a run folder.

    Several --seeds, or several values of a --set, give a folder for each run and an index. The same
    command again trains the runs that are missing.
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
            "--seeds or lists of values ask for several runs, and torchrun starts one: leave them out, "
            "or start the runs one after another"
        )
    folder = options.out or sweep_folder(recipe)
    run_all(folder, wanted, options, run)
    if not options.quiet:
        what = f"the {len(wanted)} runs are" if len(wanted) > 1 else "the run is"
        say(f"{what} in {on_a_line(folder)}, listed in its index.json")


def _what_was_scaled(name: str, wanted: list[WantedRun], scale_lr: bool) -> list[str]:
    """A line for each learning rate and each schedule that was scaled."""
    lines = []
    for resolved in (entry.recipe for entry in wanted):
        if scale_lr:
            lines.append(f"lr {resolved.lr:g}, scaled for batches of {resolved.batch_size}")
        if resolved.epochs != names.recipe(name).epochs:
            lines.append(_schedule(name, resolved))
    return list(dict.fromkeys(lines))


def _schedule(name: str, of: Recipe) -> str:
    """How the learning rate falls and the distillation ramps up; ``name``: the recipe that was named."""
    falls = ", ".join(str(milestone) for milestone in of.milestones if milestone < of.epochs)
    rate = (
        f"rate / {1 / of.lr_decay:g} after epoch {falls}" if falls else f"rate {of.lr:g} throughout"
    )
    all_of_them = len(names.recipe(name).milestones)
    if len(of.milestones) < all_of_them:
        rate += f" ({len(of.milestones)} of {all_of_them} milestones: the others coincide or come too late)"
    return f"schedule for {counted(of.epochs, 'epoch')}: {rate}, ramp over {of.ramp_epochs:g}"
