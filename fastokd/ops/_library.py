"""The ``fastokd::`` operators that the dispatcher knows: each schema is defined here, once.

C++ (``csrc/X.cpp``) and Triton (``kernels/X.py``) only register implementations of a schema; the
public functions of ``fastokd/ops/X.py`` check, choose an implementation and carry the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastokd", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Adds an operator and what it returns on fake tensors (shapes, dtypes, no values).

    The operators compute gradients beside their result, and the public functions hand those to
    autograd; so an operator itself is not differentiable, and needs no autograd registration.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastokd::{schema.split('(')[0]}", fake, lib=LIBRARY)
