"""fastokd: online knowledge distillation of a cohort of students as one fast program."""

__version__ = "0.1.0"

# Before torch, which is loaded by all others.
from fastokd.host import before_torch  # noqa: F401  # isort: skip

# Imported here, not on first use: ``train`` and ``evaluate`` are functions and modules by one
# name, and the function must be what ``fastokd.train`` means whoever imported the module first.
from fastokd.cohort import Cohort, CohortOutput
from fastokd.data import list_datasets
from fastokd.errors import UserError
from fastokd.host import cpus
from fastokd.methods import Method, MethodLoss, list_methods
from fastokd.models import list_models
from fastokd.recipe.names import Recipe, list_recipes, recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions

from fastokd.evaluate import evaluate  # isort: skip
from fastokd.train import train  # isort: skip

cpus.settle_threads()

__all__ = [
    "Cohort",
    "CohortOutput",
    "Method",
    "MethodLoss",
    "Recipe",
    "Run",
    "RunOptions",
    "UserError",
    "evaluate",
    "list_datasets",
    "list_methods",
    "list_models",
    "list_recipes",
    "recipe",
    "train",
]
