"""The methods by name."""

from __future__ import annotations

import inspect
from typing import Any

from fastokd.cohort.output import CohortShape
from fastokd.errors import UserError, unknown_name
from fastokd.methods.base import Method, MethodLoss, Needs, OptimGroup, Progress, ramp_weight
from fastokd.methods.baseline import Baseline
from fastokd.methods.cl_ilr import CLILR
from fastokd.methods.dml import DML
from fastokd.methods.ffsd import FFSD
from fastokd.methods.ind import Independent
from fastokd.methods.kd import KD
from fastokd.methods.kdcl import KDCL
from fastokd.methods.okddip import OKDDip
from fastokd.methods.okddip_ablations import (
    OKDDipEntropy,
    OKDDipMean,
    OKDDipNoTwoLevel,
    OKDDipRandom,
    OKDDipSymmetric,
)
from fastokd.methods.okddip_kd import OKDDipKD
from fastokd.methods.one import ONE

_METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "cl_ilr": CLILR,
    "dml": DML,
    "ffsd": FFSD,
    "ind": Independent,
    "kd": KD,
    "kdcl": KDCL,
    "okddip": OKDDip,
    "okddip_entropy": OKDDipEntropy,
    "okddip_kd": OKDDipKD,
    "okddip_mean": OKDDipMean,
    "okddip_no_two_level": OKDDipNoTwoLevel,
    "okddip_random": OKDDipRandom,
    "okddip_symmetric": OKDDipSymmetric,
    "one": ONE,
}


def list_methods() -> list[str]:
    """The names that recipes take."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of one method; an unknown name raises and offers the nearest ones."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]


def option_names(name: str) -> list[str]:
    """The options that one method takes, its bases' included."""
    names: dict[str, None] = {}
    for owner in method_class(name).__mro__:
        if "__init__" in vars(owner):
            parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    return sorted(names.keys() - {"impl"})


def create_method(name: str, shape: CohortShape, **options: Any) -> Method:
    """A method for a cohort of this shape; an option that it doesn't have is a `UserError`."""
    build = method_class(name)
    try:
        return build(shape, **options)
    except TypeError as error:
        raise UserError(f"the method {name!r} can't take {options}: {error}") from error


__all__ = [
    "Method",
    "MethodLoss",
    "Needs",
    "OptimGroup",
    "Progress",
    "create_method",
    "list_methods",
    "method_class",
    "option_names",
    "ramp_weight",
]
