"""fastokd: online knowledge distillation of a cohort of students as one fast program."""

__version__ = "0.1.0"

from fastokd import user  # isort: skip  # noqa: F401, before torch is imported

# Imported here, not on first use: ``train`` and ``evaluate`` are functions and modules by one
# name, and the function must be what ``fastokd.train`` means whoever imported the module first.
from fastokd.cohort import Cohort, CohortOutput
from fastokd.data import list_datasets
from fastokd.errors import UserError
from fastokd.methods import Method, MethodLoss, list_methods
from fastokd.models import list_models
from fastokd.recipes import Recipe, list_recipes, recipe
from fastokd.training.run_folder import Run
from fastokd.training.session import RunOptions

from fastokd.evaluate import evaluate  # isort: skip
from fastokd.train import train  # isort: skip

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
