"""The ``fastokd::`` operators that the dispatcher knows: each schema is defined here, once.

C++ (``csrc/X.cpp``) and Triton (``kernels/X.py``) only register implementations of a schema; the
public functions of ``fastokd/ops/X.py`` check, choose an implementation and carry the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastokd.errors import UserError

LIBRARY = torch.library.Library("fastokd", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Adds an operator and what it returns on fake tensors (shapes, dtypes, no values).

    Most compute gradients beside their result, and the public functions hand those to autograd: such
    an operator is not differentiable itself. Others have autograd of their own in C++.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = schema.split("(")[0]

    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # The dispatcher comes here where a single one is on meta: of the others' memory nothing
        # would be read, and what is returned would be whatever lay there. A number may be anywhere.
        if any(x.is_meta for x in tensors) and any(not x.is_meta and x.dim() for x in tensors):
            raise UserError(f"{op} has tensors on meta and others elsewhere: put all on one device")
        return fake(*args, **kwargs)

    torch.library.register_fake(f"fastokd::{op}", checked, lib=LIBRARY)
