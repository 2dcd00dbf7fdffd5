"""The help texts of commands under ``python -OO``, which removes docstrings."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer


def keep_docstring(function: Callable[..., Any]) -> None:
    """Restores the docstring of ``function`` from its source."""
    if function.__doc__ is None:
        with suppress(OSError):  # a package without its sources
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            if isinstance(definition, ast.FunctionDef):
                function.__doc__ = ast.get_docstring(definition)


def keep_docstrings(app: typer.Typer) -> None:
    """Restores the docstrings of all commands of ``app`` and of its subcommands."""
    for command in (*app.registered_commands, app.registered_callback):
        if command is not None and command.callback is not None:
            keep_docstring(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            keep_docstrings(group.typer_instance)
