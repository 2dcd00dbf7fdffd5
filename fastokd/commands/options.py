"""Options that several commands share, and command-line options made from a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from fastokd.run.options import RunOptions

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataRoot = Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")]
Command = Callable[..., Any]


def replacing(
    name: str, options: Mapping[str, tuple[Any, Any]], pack: Callable[..., Any]
) -> Callable[[Command], Command]:
    """A decorator. The command line has ``options`` in place of a command's parameter ``name``; the
    command is called with ``pack`` of their values.

    ``options``: for each name, its type with its help text (``Annotated[int, "Images."]``), and its
    default.
    """
    declared = []
    for option, (annotation, default) in options.items():
        kind, text = get_args(annotation)
        if kind == tuple[str, ...]:
            kind = list[str]
        shown = Annotated[kind, typer.Option(help=text)]  # type: ignore[valid-type]
        keyword = inspect.Parameter.KEYWORD_ONLY
        declared.append(inspect.Parameter(option, keyword, default=default, annotation=shown))

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            given[name] = pack(**{option: given.pop(option) for option in options})
            return command(**given)

        written = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [new for old in written for new in (declared if old.name == name else [old])]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def run_options(*names: str) -> Callable[[Command], Command]:
    """:func:`replacing` a command's parameter ``options`` by these fields of :class:`RunOptions`,
    by default all."""
    hints = get_type_hints(RunOptions, include_extras=True)
    fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(RunOptions)}
    return replacing("options", {n: fields[n] for n in names or fields}, RunOptions)
