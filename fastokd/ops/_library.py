"""The ``fastokd::`` operators: each schema is defined here once, and each Triton launcher listed.

C++ (``csrc/X.cpp``) registers its implementation of a schema itself. The public functions of
``fastokd/ops/X.py`` check their arguments, choose an implementation and attach the gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastokd.errors import UserError

Operator = Callable[..., Any]

LIBRARY = torch.library.Library("fastokd", "DEF")
OPERATORS: dict[str, Operator] = {}
LAUNCHERS: dict[str, Operator] = {}
"""The Triton launchers of the operators that have one."""


def define(schema: str, fake: Operator, kernels: str | None = None) -> None:
    """Adds an operator, what it returns on fake tensors, and its Triton launcher.

    ``kernels`` is ``module.function`` in ``fastokd.kernels``. Most operators return gradients or
    what a backward needs, which the public functions pass to autograd, and are not differentiable
    themselves; others have an autograd formula in C++.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = schema.split("(")[0]

    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # The dispatcher calls the fake for a single meta tensor, and the result would then be
        # uninitialised memory. A 0-d tensor may be on any device.
        if any(x.is_meta for x in tensors) and any(not x.is_meta and x.dim() for x in tensors):
            raise UserError(f"{op} has tensors on meta and others elsewhere: put all on one device")
        return fake(*args, **kwargs)

    torch.library.register_fake(f"fastokd::{op}", checked, lib=LIBRARY)
    if kernels is not None:
        module, function = kernels.split(".")

        def launch(*args: Any) -> Any:
            """Imports the module, which imports triton, only when it is called."""
            return getattr(importlib.import_module(f"fastokd.kernels.{module}"), function)(*args)

        LAUNCHERS[op] = launch
        LIBRARY.impl(op, launch, "CUDA")
    OPERATORS[op] = getattr(torch.ops.fastokd, op).default


def operator(op: str, impl: str, x: Tensor) -> Operator:
    """What computes ``op`` by ``impl`` on ``x``'s device: the dispatcher's operator, or the Triton
    launcher itself where its interpreter takes tensors of the CPU."""
    return LAUNCHERS[op] if impl == "triton" and not x.is_cuda else OPERATORS[op]
