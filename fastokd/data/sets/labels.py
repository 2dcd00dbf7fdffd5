"""Checks the class ids that a data set's files contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastokd.errors import UserError


def checked_labels(
    path: Path,
    values: Any,
    count: int,
    *,
    first: int,
    classes: int,
    fix: str = "fetch it again (--download)",
) -> Tensor:
    """The ids of ``count`` images as int64 ``[N]`` from 0.

    Args:
        path: the file, for the error.
        values: an array of whole numbers, ``first`` to ``first + classes - 1``, in any shape.
        fix: what to do about a fault.

    Raises:
        UserError: there is no such array, it has another length, or an id is out of range.
    """
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise UserError(f"{path} has no list of class ids: {fix}")
    flat_N = values.reshape(-1)
    if len(flat_N) != count:
        raise UserError(f"{path} has {len(flat_N)} labels for {count} images: {fix}")
    last = first + classes - 1
    wrong_N = ~((flat_N >= first) & (flat_N <= last) & (flat_N == np.floor(flat_N)))
    if wrong_N.any():
        at = int(wrong_N.argmax())
        raise UserError(
            f"{path} labels image {at} as class {flat_N[at]}, but there are only classes {first} to "
            f"{last}: {fix}"
        )
    return torch.from_numpy(flat_N.astype(np.int64) - first)
