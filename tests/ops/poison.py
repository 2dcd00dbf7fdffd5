"""Memory full of NaN, so that an element that isn't written shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def poisoned(on: bool = True) -> Iterator[None]:
    """Within, what ``torch.empty`` returns holds NaN; ``on=False``: within, it doesn't.

    It comes with PyTorch's deterministic algorithms, which some operators don't have on a GPU or want
    set up there (cuBLAS): a reference is computed without.
    """
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    deterministic.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
