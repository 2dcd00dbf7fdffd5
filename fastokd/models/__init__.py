"""The students: plain modules, and the registry that names them."""

from fastokd.known import list_models
from fastokd.models.info import ModelInfo, map_shapes, model_info, trunk_shape
from fastokd.models.registry import (
    check_options,
    create_model,
    input_size,
    model_spec,
    option_defaults,
    register_model,
)
from fastokd.models.sizes import least_batch
from fastokd.models.spec import ModelSpec
from fastokd.models.student import Student, StudentOutput

__all__ = [
    "ModelInfo",
    "ModelSpec",
    "Student",
    "StudentOutput",
    "check_options",
    "create_model",
    "input_size",
    "least_batch",
    "list_models",
    "map_shapes",
    "model_info",
    "model_spec",
    "option_defaults",
    "register_model",
    "trunk_shape",
]
