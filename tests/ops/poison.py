"""Memory full of NaN, so that an element that isn't written shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned(on: bool = True) -> Iterator[None]:
    """Within, what ``torch.empty`` returns holds NaN; ``on=False``: within, it doesn't.

    It comes with PyTorch's deterministic algorithms, which some operators on a GPU don't have
    (``kthvalue``) or want set up (cuBLAS): a reference is computed without.
    """
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
