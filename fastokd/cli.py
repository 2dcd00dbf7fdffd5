"""The commands: nothing but parsing and printing."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastokd.commands import student as cli_student
from fastokd.commands.bench import bench, plan
from fastokd.commands.options import (
    DataRoot,
    Device,
    Download,
    Engine,
    Impl,
    Json,
    Loader,
    MaxSteps,
    Precision,
    Workers,
)
from fastokd.commands.prepare import prepare
from fastokd.distributed.launch import launched, of_the_first_rank
from fastokd.errors import DISK, UserError, unknown_name
from fastokd.methods import register_method
from fastokd.training.interruption import Interrupted

INTERRUPTED = 130  # by ^C, as shells have it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train a cohort of students that teach each other, and keep the leader.",
)


cli_student.register(app)
app.add_typer(bench, name="bench")
app.command(epilog="Example: fastokd plan okddip-branch/resnet32/cifar100 --device h100")(plan)
app.command(epilog="Example: fastokd prepare imagenet --data-root /data/imagenet")(prepare)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    method: Annotated[
        str | None, typer.Option(help="A method of your own that a run was trained by.")
    ] = None,
) -> None:
    """Options of every command."""
    del debug, method  # read by run_command(), before the command and after its errors


@app.command(epilog="Example: fastokd train okddip-branch/resnet32/cifar100 --data-root data")
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
    scale_lr: Annotated[
        bool, typer.Option(help="The rate times --batch-size over the recipe's own batch.")
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
    from fastokd.sweep import parse_seeds, parse_settings, plan, run_all, scaled_rate, sweep_folder
    from fastokd.train import train as run
    from fastokd.training.session import RunOptions

    quiet = quiet or not of_the_first_rank()
    changes: dict[str, Any] = {
        "epochs": epochs,
        "seed": seed,
        "students": students,
        "batch_size": batch_size,
        "lr": lr,
        "method": method,
        "val": val,
        "image_size": image_size,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if scale_lr:
        changes["lr"] = scaled_rate(recipe, lr, batch_size)
    if temperature is not None:
        changes["method_options"] = {"temperature": temperature}
    if seeds is not None and seed is not None:
        raise UserError("--seed and --seeds say the same thing: give one of them")
    settings = parse_settings(set_ or [])
    planned = plan(recipe, changes, settings, [seed or 0] if seeds is None else parse_seeds(seeds))
    resolved = planned[0].recipe
    if scale_lr and not quiet:
        print(f"lr {resolved.lr:g}, scaled for batches of {resolved.batch_size}")
    if print_recipe:
        for entry in planned:
            print(json.dumps(entry.recipe.to_json(), indent=1))
        return
    if epochs is not None and not quiet:
        print(
            f"schedule for {epochs} epochs: rate / {1 / resolved.lr_decay:g} before epochs "
            f"{list(resolved.milestones)}, ramp over {resolved.ramp_epochs:g}"
        )
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
        show_augmentation=show_augmentation,
        tensorboard=tensorboard,
        wandb=wandb,
        quiet=quiet,
    )
    if len(planned) == 1 and seeds is None:
        done = run(resolved, options)
        if not quiet:
            print(f"the run is in {done.folder}")
        return
    if launched() > 1:
        raise UserError(
            f"{len(planned)} runs are asked for, and torchrun starts one: leave --seeds and lists of "
            "values out, or start them one after another"
        )
    folder = out or sweep_folder(recipe)
    run_all(folder, planned, options)
    if not quiet:
        print(f"the {len(planned)} runs are in {folder}, listed in its index.json")


@app.command(epilog="Example: fastokd reproduce table2 --only resnet32 --epochs 30 --seeds 0,1")
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, figure3 or ffsd.")],
    dataset: Annotated[str | None, typer.Option(help="In place of the paper's.")] = None,
    model: Annotated[str | None, typer.Option(help="In place of the paper's students.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs; the schedule scales.")] = None,
    seeds: Annotated[str, typer.Option(help="A run for each.")] = "0,1,2",
    val: Annotated[int | None, typer.Option(help="Images held out to choose the epoch.")] = None,
    only: Annotated[str, typer.Option(help="Cells whose recipe's name contains this.")] = "",
    out: Annotated[Path | None, typer.Option(help="The runs; runs/TABLE.")] = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
    impl: Impl = "auto",
    max_steps: MaxSteps = None,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option(help="Print the table alone.")] = False,
) -> None:
    """Train a table of the papers and set it beside what was published.

    The same command again goes on with what is missing.
    """
    from rich.console import Console

    from fastokd.report.reproduce import Request, as_table
    from fastokd.report.reproduce import reproduce as run
    from fastokd.sweep import parse_seeds
    from fastokd.training.session import RunOptions

    request = Request(table, tuple(parse_seeds(seeds)), dataset, model, epochs, val, only)
    options = RunOptions(
        data_root=data_root,
        download=download,
        device=device,
        precision=precision,
        engine=engine,
        impl=impl,
        max_steps=max_steps,
        quiet=quiet or json_,
    )
    done = run(request, out or Path("runs") / table, options)
    if json_:
        print(json.dumps(done.to_json()))
    else:
        # Where nothing says how wide the output is, 80 columns would fold the numbers.
        Console(width=None if sys.stdout.isatty() else 120).print(as_table(done))


@app.command(name="list", epilog="Example: fastokd list recipes --json")
def list_(
    what: Annotated[str, typer.Argument(help="models, methods, datasets or recipes.")],
    json_: Json = False,
) -> None:
    """List what there is."""
    import fastokd

    lists = {
        "models": fastokd.list_models,
        "methods": fastokd.list_methods,
        "datasets": fastokd.list_datasets,
        "recipes": fastokd.list_recipes,
    }
    if what not in lists:
        raise unknown_name("list", what, lists)
    names = lists[what]()
    print(json.dumps(names) if json_ else "\n".join(names))


@app.command(epilog="Example: fastokd model-info resnet32 --num-classes 100")
def model_info(
    name: Annotated[str, typer.Argument(help="A model; `fastokd list models`.")],
    num_classes: Annotated[int, typer.Option(help="C.")] = 100,
    json_: Json = False,
) -> None:
    """Count a student: parameters, multiply-accumulates, feature width, maps."""
    import dataclasses

    from fastokd.models import model_info as count

    info = dataclasses.asdict(count(name, num_classes))
    _print_facts(info, json_)


@app.command(epilog="Example: fastokd doctor --json")
def doctor(json_: Json = False) -> None:
    """Say which implementations, devices and optional packages work here, and why not."""
    from fastokd.doctor import diagnose

    _print_facts(diagnose(), json_)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key}: {inner}")
        else:
            print(f"{name}: {value}")


def _own_methods(arguments: list[str]) -> list[str]:
    """Loads every ``--method package.module:Class``; the arguments without them, but train's own."""
    left: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--method":
            left.append(word)
            continue
        name = value if equals else next(words, "")
        register_method(name)
        if "train" in arguments:
            left += ["--method", name]
    return left


def _usage_error(error: Any, arguments: Sequence[str]) -> str:
    """What typer says of a command line, with the value that it is about and where to look."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = context.command_path if context is not None else "fastokd"
    kinds = {"integer": "a whole number", "number": "a number", "float": "a number"}
    message = str(getattr(error, "message", ""))
    kind = next((what for word, what in kinds.items() if f"valid {word}" in message), None)
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if kind and option in getattr(parameter, "opts", ()):
            return f"{option} is {value if equals else following!r}: it must be {kind}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said}; `{command} --help` has an example"


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command; the exit code: 0, or 2 for what a user got wrong, in one sentence."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        arguments = _own_methods(arguments)
        code = app(list(arguments) or ["--help"], prog_name="fastokd", standalone_mode=False)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"fastokd: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if of_the_first_rank():
            print(
                f"fastokd: stopped by {stop.signal}; the run is saved, --resume continues it",
                file=sys.stderr,
            )
        return stop.code
    except OSError as error:
        if debug or error.errno not in DISK:
            raise
        print(f"fastokd: the disk can't be written: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # typer carries its own copy of click, whose usage errors have no public name.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        print(f"fastokd: {_usage_error(error, arguments)}", file=sys.stderr)
        return 2
    if code == INTERRUPTED:
        print("fastokd: interrupted; train continues where --resume is added", file=sys.stderr)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
