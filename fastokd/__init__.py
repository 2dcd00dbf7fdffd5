"""fastokd: online knowledge distillation of a cohort of students as one fast program."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Sets the environment that torch reads when it is imported, and so comes first.
from fastokd.host import before_torch  # noqa: F401

if TYPE_CHECKING:
    from fastokd.cohort import Cohort as Cohort
    from fastokd.cohort import CohortOutput as CohortOutput
    from fastokd.errors import UserError as UserError
    from fastokd.evaluate import evaluate as evaluate
    from fastokd.export import export as export
    from fastokd.known import list_datasets as list_datasets
    from fastokd.known import list_methods as list_methods
    from fastokd.known import list_models as list_models
    from fastokd.methods import Method as Method
    from fastokd.methods import MethodLoss as MethodLoss
    from fastokd.recipe.names import Recipe as Recipe
    from fastokd.recipe.names import list_recipes as list_recipes
    from fastokd.recipe.names import recipe as recipe
    from fastokd.result import Run as Run
    from fastokd.run.options import RunOptions as RunOptions
    from fastokd.student.predict import predict as predict
    from fastokd.train import resume as resume
    from fastokd.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "Cohort": "cohort",
    "CohortOutput": "cohort",
    "Method": "methods",
    "MethodLoss": "methods",
    "Recipe": "recipe.names",
    "Run": "result",
    "RunOptions": "run.options",
    "UserError": "errors",
    "evaluate": "evaluate",
    "export": "export",
    "list_datasets": "known",
    "list_methods": "known",
    "list_models": "known",
    "list_recipes": "recipe.names",
    "predict": "student.predict",
    "recipe": "recipe.names",
    "resume": "train",
    "train": "train",
}
__all__ = [*_HOMES]


class _Package(ModuleType):
    """Imports what it is asked for, so that ``import fastokd`` doesn't import torch."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"fastokd.{_HOMES[name]}"), name)
            super().__setattr__(name, value)
            return value
        # A package or module of fastokd: ``fastokd.ops`` after ``import fastokd``.
        if name.startswith("_") or find_spec(f"fastokd.{name}") is None:
            raise AttributeError(f"module 'fastokd' has no attribute {name!r}")
        return import_module(f"fastokd.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule to its package when it is imported. ``train``, ``evaluate``,
        # ``export`` and ``recipe`` are submodules too, but the package's attributes are the functions.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
