"""Options that several commands share, and command-line options made from a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from fastokd.errors import UserError
from fastokd.run.options import RunOptions

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataRoot = Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")]
Function = Callable[..., Any]


class Command(TyperCommand):
    """A command whose options may be given twice only with the same value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _check_repeats(self.get_params(ctx), args)
        return super().parse_args(ctx, args)


def _check_repeats(parameters: Iterable[Any], arguments: Sequence[str]) -> None:
    """Raises for an option that takes one value and has two in ``arguments``."""
    options = {name: p for p in parameters for name in (*p.opts, *p.secondary_opts)}
    seen: dict[str, tuple[str, str]] = {}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == "--":
            return
        name, equals, value = word.partition("=")
        option = options.get(name) if name.startswith("-") else None
        if option is None or option.multiple:
            continue
        if option.is_flag:
            said, value = name, str(name in option.opts)
        else:
            value = value if equals else following
            said = f"{name} {value}"
        before, earlier = seen.setdefault(option.name, (said, value))
        if not _equal(earlier, value):
            raise UserError(f"{before} and {said} contradict each other: leave one of them out")


def _equal(first: str, second: str) -> bool:
    try:
        return first == second or float(first) == float(second)
    except ValueError:
        return False


def replacing(
    name: str, options: Mapping[str, tuple[Any, Any]], pack: Callable[..., Any]
) -> Callable[[Function], Function]:
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

    def decorate(command: Function) -> Function:
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


def run_options(*names: str) -> Callable[[Function], Function]:
    """:func:`replacing` a command's parameter ``options`` by these fields of :class:`RunOptions`,
    by default all."""
    hints = get_type_hints(RunOptions, include_extras=True)
    fields = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(RunOptions)}
    return replacing("options", {n: fields[n] for n in names or fields}, RunOptions)
