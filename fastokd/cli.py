"""The program ``fastokd``: its commands, its exit codes and its error messages."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import fastokd
from fastokd.commands import facts, student
from fastokd.commands.bench import bench, plan
from fastokd.commands.compare import compare
from fastokd.commands.help import keep_docstrings
from fastokd.commands.prepare import prepare
from fastokd.commands.reproduce import reproduce
from fastokd.commands.runs import clean, runs, watch
from fastokd.commands.train import FORMATS, train
from fastokd.errors import DISK, Interrupted, UserError, wrong_type
from fastokd.host.names import on_a_line
from fastokd.host.streams import guarded, open_missing, reason
from fastokd.run.loggers import still_busy

# Exit codes as shells define them: after ^C, and after a write to a closed pipe.
INTERRUPTED = 130
UNREAD = 128 + signal.SIGPIPE

# Options of `compare` that take several numbers.
LISTS = ("--label-noise", "--fraction", "--seeds")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train students that learn from each other, and keep one of them.",
)

# In the order of --help. bench has subcommands, so typer lists it last.
for _command, _example in (
    (student.report, "report runs/* -o report.html"),
    (student.diff, "diff runs/a runs/b"),
    (runs, "runs --sort -top-1"),
    (watch, "watch runs"),
    (clean, "clean --checkpoints --older-than 7d"),
    (student.export, "export runs/RUN --to onnx"),
    (student.predict, "predict runs/RUN pictures/ --csv found.csv"),
    (student.evaluate, "evaluate runs/okddip-branch-resnet8-digits-seed0"),
    (student.convert, "convert modelleader_best.pth --out resnet32.safetensors"),
    (plan, "plan okddip-branch/resnet32/cifar100 --device h100"),
    (prepare, "prepare imagenet --data-root /data/imagenet"),
    (train, "train okddip-branch/resnet32/cifar100 --data-root data"),
    (compare, "compare okddip-branch,dml --model resnet32 --dataset cifar100 --seeds 0,1,2,3,4"),
    (reproduce, "reproduce table2 --only resnet32 --epochs 30 --seeds 0,1"),
    (facts.list_, "list recipes --json"),
    (facts.model_info, "model-info resnet32 --num-classes 100"),
    (facts.doctor, "doctor --json"),
):
    app.command(_example.split()[0], epilog=f"Example: fastokd {_example}")(_command)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print(f"fastokd {fastokd.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    method: Annotated[
        str | None,
        typer.Option(help="Your own method that a run was trained with: package.module:Class."),
    ] = None,
) -> None:
    """Options of every command."""
    del version, debug, method  # _run() reads them from the arguments


keep_docstrings(app)


def _own_methods(arguments: list[str]) -> list[str]:
    """Loads every ``--method package.module:Class``, wherever it is. Returns the arguments without
    them, but those of ``train``."""
    left: list[str] = []
    names: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--method":
            left.append(word)
            continue
        name = value if equals else next(words, "")
        if not name or name.startswith("-"):
            raise UserError("--method needs a value: name your method as package.module:Class")
        names.append(name)
    if names:
        from fastokd.methods import register_method

        # Last on the path, so that no file there hides a module of Python or torch. Worker processes
        # get the same path.
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        for name in names:
            register_method(name)
    if _called(left) == "train":
        at = left.index("train") + 1
        left[at:at] = [word for name in names for word in ("--method", name)]
    return left


def _with_format(arguments: list[str]) -> list[str]:
    """``--print-recipe`` with the format that typer needs: it has no options whose value may be left out."""
    return [
        "--print-recipe=json" if word == "--print-recipe" and next_ not in FORMATS else word
        for word, next_ in zip(arguments, [*arguments, ""][1:], strict=True)
    ]


def _with_lists(arguments: list[str]) -> list[str]:
    """Lists of numbers after ``compare``'s switches may have spaces: ``--fraction 0.01 0.1``."""
    if _called(arguments) != "compare":
        return arguments
    joined: list[str] = []
    option = ""
    for word in arguments:
        number = word.replace(",", "").replace(".", "").isdecimal()
        if number and option in LISTS and joined[-1] != option:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
            option = option if number else word
    return joined


def _called(arguments: Sequence[str]) -> str | None:
    """The first word that is no option; those before it have no values once --method is read."""
    return next((word for word in arguments if not word.startswith("-")), None)


def _usage_error(error: Any, arguments: Sequence[str]) -> str:
    """typer's message about a command line, with the wrong value and the command whose help to read."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = context.command_path if context is not None else "fastokd"
    kinds = {"integer": "a whole number", "number": "a number", "float": "a number"}
    message = str(getattr(error, "message", ""))
    kind = next((what for word, what in kinds.items() if f"valid {word}" in message), None)
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if kind and option in getattr(parameter, "opts", ()):
            return str(wrong_type(option, value if equals else following, kind))
    names = getattr(error, "possibilities", None)
    unknown = error.option_name if hasattr(error, "possibilities") else None
    if command == "fastokd train" and unknown is not None:
        from fastokd.recipe.changes import is_setting

        key = unknown.strip("-").replace("-", "_")
        if is_setting(key):
            return f"{unknown} is no option of train but a setting: write --set {key}=VALUE"
    if unknown is not None:
        known = [name.strip("-") for name in names or ()]
        close = difflib.get_close_matches(unknown.strip("-"), known, cutoff=0.7)
        near = " or ".join(f"--{name}" for name in close)
        hint = f": did you mean {near}?" if near else f"; `{command} --help` has an example"
        return f"No such option {unknown}{hint}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said}; `{command} --help` has an example"


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0, or 2 after a one-sentence message about a
    user's error.

    The code is 141, without a message, if the reader of standard output has gone away.
    """
    with guarded() as out:
        code = _run(arguments)
        if code != 0 or out.lost is None:
            return code
        if isinstance(out.lost, OSError) and out.lost.errno == errno.EPIPE:
            return UNREAD
        _complain(f"standard output can't be written: {reason(out.lost)}")
        return 2


def _complain(text: object) -> None:
    print(f"fastokd: {on_a_line(text)}", file=sys.stderr)


def _run(arguments: Sequence[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        arguments = _with_lists(_with_format(_own_methods(arguments)))
        code = app(list(arguments) or ["--help"], prog_name="fastokd", standalone_mode=False)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _complain(error)
        return 2
    except Interrupted as stop:
        from fastokd.distributed.launch import of_the_first_rank

        if of_the_first_rank():
            how = "`fastokd train --resume DIR` continues the run"
            if _called(arguments) in ("compare", "reproduce"):
                how = "the same command continues"
            _complain(f"stopped by {stop.signal}; {how}")
        return stop.code
    except OSError as error:
        if debug or error.errno not in DISK:
            raise
        _complain(f"the disk can't be written: {error}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Usage errors of the click that typer bundles have no public class.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        _complain(_usage_error(error, arguments))
        return 2
    if code == INTERRUPTED:
        resumes = "; --resume continues a run that has saved a checkpoint"
        _complain(f"interrupted{resumes if _called(arguments) == 'train' else ''}")
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by before_torch
        signal.signal(signal.SIGINT, signal.default_int_handler)
    open_missing()
    code = run_command(sys.argv[1:])
    if still_busy():
        os._exit(code)  # sys.exit() would wait for the logger's thread
    sys.exit(code)


if __name__ == "__main__":
    main()
