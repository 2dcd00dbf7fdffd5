"""The command ``train``: parsing and printing."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands.options import replacing, run_options
from fastokd.errors import UserError
from fastokd.host.names import counted, on_a_line
from fastokd.host.streams import say
from fastokd.known import METHODS, place_of
from fastokd.recipe import names
from fastokd.recipe.file import as_toml, is_file
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.schedule import said
from fastokd.recipe.settings import WantedRun, parse_seeds, parse_settings, wanted_runs
from fastokd.run.options import RunOptions

# What --print-recipe prints.
FORMATS = ("json", "toml")
# Settings of a recipe that have their own option; ``--set`` sets the others.
FLAGS = {
    "epochs": (Annotated[int | None, "Number of epochs. The schedule is scaled to it."], None),
    "seed": (Annotated[int | None, "Seed of weights, order and augmentation."], None),
    "students": (Annotated[int | None, "Number of networks, leader included."], None),
    "batch_size": (Annotated[int | None, "Images per step."], None),
    "lr": (Annotated[float | None, "Learning rate of the first epoch."], None),
    "optimizer": (Annotated[str | None, "sgd, adamw or lamb."], None),
    "temperature": (Annotated[float | None, "Temperature of the distillation."], None),
    "method": (
        Annotated[str | None, "Your own method instead of the recipe's: package.module:Class."],
        None,
    ),
    "val": (
        Annotated[
            float | None, "Held out of train to validate: images, or a fraction such as 0.1."
        ],
        None,
    ),
    "test": (
        Annotated[float | None, "The same to test, for an image folder without test/."],
        None,
    ),
    "ema": (
        Annotated[
            float | None,
            "Decay of a moving average of the kept student; the average is kept instead.",
        ],
        None,
    ),
    "image_size": (Annotated[int | None, "Height and width of an imagefolder's images."], None),
}


@replacing("flags", FLAGS, dict)
@run_options()
def train(
    flags: dict[str, Any],
    options: RunOptions,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="METHOD/MODEL/DATASET (`fastokd list recipes`), or FILE.toml; with --resume the folder "
            "of a run.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of several runs: 0,1,2.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the recipe, method or model, KEY=VALUE[,VALUE]; repeatable."
        ),
    ] = None,
    scale_lr: Annotated[
        bool,
        typer.Option(help="Scale the learning rate in proportion to the batch size."),
    ] = False,
    print_recipe: Annotated[
        str | None,
        typer.Option(help="Print the recipe and stop: as json, or as toml, a file for `train`."),
    ] = None,
) -> None:
    """Train a recipe and write a run folder.

    Several --seeds, or several values of a --set, train one run for each, with an index. Rerun the same
    command to finish missing runs. `fastokd train --resume DIR` continues the run in
    DIR; a larger --epochs extends it.
    """
    from fastokd.distributed.launch import launched, of_the_first_rank
    from fastokd.run.summary import summarise
    from fastokd.run.sweep import run_all, sweep_folder
    from fastokd.train import recipe_to_resume, resume
    from fastokd.train import train as run

    if not of_the_first_rank():
        options = dataclasses.replace(options, quiet=True)
    begun = _run_to_resume(recipe, options)
    if begun is not None:
        its_recipe = recipe_to_resume(begun, flags["epochs"])
        given = {**flags, "set": set_, "seeds": seeds, "scale_lr": scale_lr or None}
        _refuse_settings(given, its_recipe.method)
        if print_recipe:
            print(_printed(its_recipe, print_recipe))
        else:
            _close(resume(begun, options, epochs=flags["epochs"]), options)
        return
    if recipe is None:
        raise UserError(
            "train needs a recipe, such as okddip-branch/resnet8/digits, or --resume and the folder of "
            "a run; `fastokd train --help` has an example"
        )
    several = None if seeds is None else parse_seeds(seeds)
    settings = parse_settings(set_ or [])
    wanted = wanted_runs(recipe, flags, settings, seeds=several, scale_lr=scale_lr)
    if print_recipe:
        for entry in wanted:
            print(_printed(entry.recipe, print_recipe))
        return
    if not options.quiet:
        for line in _what_was_scaled(recipe, wanted, scale_lr):
            say(line)
    if len(wanted) == 1 and seeds is None:
        if is_file(recipe) and options.out is None:
            options = dataclasses.replace(options, out=Path("runs") / wanted[0].folder)
        _close(run(wanted[0].recipe, options), options)
        return
    if launched() > 1:
        raise UserError(
            "--seeds or lists of values ask for several runs, and torchrun starts one: leave them out, "
            "or start the runs one after another"
        )
    folder = options.out or sweep_folder(recipe)
    done = run_all(folder, wanted, options, run)
    if not options.quiet:
        for entry, one in zip(wanted, done, strict=True):
            say(f"{on_a_line(entry.folder)}: {summarise(one)}")
        which = "the run is" if len(wanted) == 1 else f"the {len(wanted)} runs are"
        say(f"{which} in {on_a_line(folder)}, listed in its index.json; next:")
        say(f"  fastokd report {on_a_line(shlex.quote(str(folder)))}")


def _printed(recipe: Recipe, form: str) -> str:
    """The recipe as ``--print-recipe`` prints it."""
    if form == "json":
        return json.dumps(recipe.to_json(), indent=1)
    if form != "toml":
        raise UserError(f"--print-recipe is {form!r}: choose json or toml")
    own = recipe.method not in METHODS
    base = f"ind-{recipe.sharing}/{recipe.model}/{recipe.dataset}" if own else recipe.name
    return as_toml(recipe, names.recipe(base)).rstrip()


def _run_to_resume(recipe: str | None, options: RunOptions) -> Path | None:
    """The folder of ``--resume`` without a recipe, or None."""
    if not options.resume or (recipe is not None and options.out is not None):
        return None
    folder = options.out if recipe is None else Path(recipe)
    if folder is None:
        raise UserError("--resume needs a run: name its folder, as in `fastokd train --resume DIR`")
    if (folder / "index.json").is_file():
        raise UserError(
            f"{folder} holds several runs: repeat the command that began them, or name one of them"
        )
    # A recipe's name looks like a path, too.
    parts = (recipe or "").split("/", 2)
    named = len(parts) == 3 and ("/" not in parts[2] or bool(place_of(parts[2])[1]))
    named = named and not folder.parent.is_dir()
    if not named and not (folder / "recipe.json").is_file():
        raise UserError(f"there is no run to resume in {folder}: name the folder of a run")
    return None if named else folder


def _refuse_settings(given: Mapping[str, Any], method: str) -> None:
    """Raises UserError for a setting that a resumed run can't change. ``--method`` only loads the code
    of the run's own ``method``."""
    for name, value in given.items():
        if value is not None and name != "epochs" and (name, value) != ("method", method):
            raise UserError(
                f"--{name.replace('_', '-')} is given, but a resumed run keeps its recipe: leave it out"
            )


def _close(run: Any, options: RunOptions) -> None:
    """Says how the run ended, and what to do next."""
    from fastokd.run.summary import summarise

    if options.quiet:
        return
    folder = on_a_line(shlex.quote(str(run.folder)))
    say(str(summarise(run)))
    if not run.is_whole:
        at = run.standing
        say(
            f"ended at step {at.step}, with {at.epochs} of {counted(run.recipe.epochs, 'epoch')} complete"
        )
    say(f"the run is in {on_a_line(run.folder)}; next:")
    if not run.is_whole:
        say(f"  fastokd train --resume {folder}")
    say(f"  fastokd report {folder}")
    say(f"  fastokd export {folder} --to onnx")


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
    until = f"ramp over {of.ramp_epochs:.3g} epochs"
    if of.schedule != "step":
        return f"schedule for {counted(of.epochs, 'epoch')}: {said(of)}, {until}"
    falls = ", ".join(str(milestone) for milestone in of.milestones if milestone < of.epochs)
    rate = (
        f"rate / {1 / of.lr_decay:g} after epoch {falls}" if falls else f"rate {of.lr:g} throughout"
    )
    all_of_them = len(names.recipe(name).milestones)
    if len(of.milestones) < all_of_them:
        rate += f" ({len(of.milestones)} of {all_of_them} milestones: the others coincide or come too late)"
    return f"schedule for {counted(of.epochs, 'epoch')}: {rate}, {until}"
