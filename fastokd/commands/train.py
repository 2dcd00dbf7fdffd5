"""The command ``train``: nothing but parsing and printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastokd.commands.options import (
    DataRoot,
    Device,
    Download,
    Engine,
    Impl,
    Loader,
    MaxSteps,
    Precision,
    Workers,
)
from fastokd.distributed.launch import launched, of_the_first_rank
from fastokd.errors import UserError
from fastokd.host.names import on_a_line
from fastokd.host.streams import say

if TYPE_CHECKING:
    from fastokd.recipe.settings import Planned


def train(
    recipe: Annotated[str, typer.Argument(help="METHOD/MODEL/DATASET; `fastokd list recipes`.")],
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/RECIPE-seedN.")] = None,
    data_root: DataRoot = None,
    download: Download = False,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Epochs; the schedule scales.")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, order and augmentation.")] = None,
    students: Annotated[int | None, typer.Option(help="Networks, leader included.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the first epoch.")] = None,
    temperature: Annotated[float | None, typer.Option(help="T of the distillation.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A method of your own in the recipe's: package.module:Class.")
    ] = None,
    val: Annotated[int | None, typer.Option(help="Images held out of train.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width, of an imagefolder.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    teacher: Annotated[
        Path | None, typer.Option(help="A run or a student.safetensors, for kd and okddip_kd.")
    ] = None,
    init: Annotated[
        list[str] | None,
        typer.Option(help="Trained weights to begin from; one for all, or one a student."),
    ] = None,
    engine: Engine = "auto",
    impl: Impl = "auto",
    optimizer: Annotated[str, typer.Option(help="sgd (fused) or apex-sgd.")] = "sgd",
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Forward and loss through torch.compile."),
    ] = None,
    memory_format: Annotated[str, typer.Option(help="auto, channels_last or contiguous.")] = "auto",
    capture: Annotated[bool, typer.Option(help="The whole step as a CUDA graph.")] = False,
    accumulate: Annotated[int, typer.Option(help="Take a batch in so many parts.")] = 1,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    skip_nonfinite: Annotated[
        int, typer.Option(help="Steps that may be left out because a value isn't finite.")
    ] = 0,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the leader.")] = None,
    loader: Loader = "auto",
    workers: Workers = 0,
    eval_every: Annotated[int, typer.Option(help="Epochs between evaluations.")] = 1,
    save_every_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; after each epoch in any case.")
    ] = None,
    save_every_minutes: Annotated[
        float | None, typer.Option(help="Minutes between checkpoints.")
    ] = 15.0,
    max_steps: MaxSteps = None,
    overfit_batch: Annotated[bool, typer.Option(help="Train on one batch only.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Several runs: 0,1,2.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of recipe or method, KEY=VALUE[,VALUE]; repeatable."),
    ] = None,
    parallel: Annotated[
        str, typer.Option(help="What ranks share under torchrun: data, or students.")
    ] = "data",
    sync_bn: Annotated[bool, typer.Option(help="BatchNorm over the batch of all ranks.")] = False,
    deterministic: Annotated[
        bool, typer.Option(help="The same bits each time, on a GPU too; slower there.")
    ] = False,
    scale_lr: Annotated[
        bool, typer.Option(help="The rate times the batch over the recipe's own batch.")
    ] = False,
    show_augmentation: Annotated[
        bool, typer.Option(help="Leave a batch as the students see it, augmentation.png.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option(help="Tell TensorBoard, in the run folder.")] = False,
    wandb: Annotated[bool, typer.Option(help="Tell Weights & Biases.")] = False,
    print_recipe: Annotated[bool, typer.Option(help="Print the recipe and stop.")] = False,
    quiet: Annotated[bool, typer.Option(help="Print nothing but errors.")] = False,
) -> None:
    """Train a cohort by a recipe and leave a run folder.

    With several --seeds, or several values to a --set: a folder for each run and an index; the same
    command again goes on with what is missing.
    """
    from fastokd.recipe.settings import parse_seeds, parse_settings, plan
    from fastokd.run.options import RunOptions
    from fastokd.run.sweep import run_all, sweep_folder
    from fastokd.train import train as run

    quiet = quiet or not of_the_first_rank()
    flags = {
        "epochs": epochs,
        "seed": seed,
        "students": students,
        "batch_size": batch_size,
        "lr": lr,
        "temperature": temperature,
        "method": method,
        "val": val,
        "image_size": image_size,
    }
    several = None if seeds is None else parse_seeds(seeds)
    planned = plan(recipe, flags, parse_settings(set_ or []), seeds=several, scale_lr=scale_lr)
    resolved = planned[0].recipe
    if print_recipe:
        for entry in planned:
            print(json.dumps(entry.recipe.to_json(), indent=1))
        return
    if not quiet:
        for line in _what_was_scaled(recipe, planned, scale_lr):
            say(line)
    options = RunOptions(
        out=out,
        data_root=data_root,
        download=download,
        device=device,
        precision=precision,
        engine=engine,
        impl=impl,
        teacher=teacher,
        init=tuple(init or ()),
        resume=resume,
        max_steps=max_steps,
        overfit_batch=overfit_batch,
        optimizer=optimizer,
        compile=compile_,
        memory_format=memory_format,
        capture=capture,
        accumulate=accumulate,
        clip_norm=clip_norm,
        skip_nonfinite=skip_nonfinite,
        ema=ema,
        loader=loader,
        workers=workers,
        eval_every=eval_every,
        save_every_steps=save_every_steps,
        save_every_minutes=save_every_minutes,
        parallel=parallel,
        sync_bn=sync_bn,
        deterministic=deterministic,
        show_augmentation=show_augmentation,
        tensorboard=tensorboard,
        wandb=wandb,
        quiet=quiet,
    )
    if len(planned) == 1 and seeds is None:
        done = run(resolved, options)
        if not quiet:
            say(f"the run is in {on_a_line(done.folder)}")
        return
    if launched() > 1:
        raise UserError(
            f"{len(planned)} runs are asked for, and torchrun starts one: leave --seeds and lists of "
            "values out, or start them one after another"
        )
    folder = out or sweep_folder(recipe)
    run_all(folder, planned, options)
    if not quiet:
        say(f"the {len(planned)} runs are in {on_a_line(folder)}, listed in its index.json")


def _what_was_scaled(name: str, planned: list[Planned], scale_lr: bool) -> list[str]:
    """A line for each rate that follows its batch, and each schedule that follows its epochs."""
    from fastokd.recipe.names import recipe

    lines = []
    for resolved in (entry.recipe for entry in planned):
        if scale_lr:
            lines.append(f"lr {resolved.lr:g}, scaled for batches of {resolved.batch_size}")
        if resolved.epochs != recipe(name).epochs:
            lines.append(
                f"schedule for {resolved.epochs} epochs: rate / {1 / resolved.lr_decay:g} before "
                f"epochs {list(resolved.milestones)}, ramp over {resolved.ramp_epochs:g}"
            )
    return list(dict.fromkeys(lines))
