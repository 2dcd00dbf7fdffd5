"""The students: plain modules, and the registry that names them."""

from fastokd.models import resnet  # noqa: F401  (registers its students)
from fastokd.models.info import ModelInfo, model_info
from fastokd.models.registry import (
    ModelSpec,
    create_model,
    list_models,
    model_spec,
    register_model,
)
from fastokd.models.student import Student, StudentOutput

__all__ = [
    "ModelInfo",
    "ModelSpec",
    "Student",
    "StudentOutput",
    "create_model",
    "list_models",
    "model_info",
    "model_spec",
    "register_model",
]
