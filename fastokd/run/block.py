"""What the host draws for many steps, uploaded at once and read by a counter on the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from fastokd.device import staged

# Steps of one upload, or fewer where their draws are larger than this.
STEPS = 64
BYTES = 32 << 20

Draws = dict[str, Tensor]


class Block:
    """The draws of several steps, on the device.

    Its tensors stay the same, and so does the counter, so a CUDA graph can contain :meth:`read`.

    ``steps``: the most steps that it holds; None for ``STEPS``.
    """

    def __init__(self, device: torch.device, steps: int | None = None) -> None:
        self.device = device
        self.steps = STEPS if steps is None else steps
        self.tensors: Draws = {}
        self._at = torch.zeros(1, dtype=torch.long, device=device)

    def fill(self, draws: Iterator[Draws]) -> int:
        """Uploads the first of ``draws``, a step each; returns the number of these steps.

        The copies are queued behind the steps that read the block before. The draws of each step have
        the same names, shapes and dtypes.
        """
        first = next(draws)
        if not self.tensors:
            size = sum(x.nbytes for x in first.values())
            self.steps = max(1, min(self.steps, BYTES // max(size, 1)))
            self.tensors = {
                name: torch.empty(self.steps, *x.shape, dtype=x.dtype, device=self.device)
                for name, x in first.items()
            }
        taken = [first, *islice(draws, self.steps - 1)]
        for name, kept in self.tensors.items():
            host = staged(torch.stack([one[name] for one in taken]), self.device)
            kept[: len(taken)].copy_(host, non_blocking=True)
        if self.tensors:
            self._at.zero_()
        return len(taken)

    def read(self) -> Draws:
        """The draws of the next step; moves the counter."""
        draws = {name: x.index_select(0, self._at)[0] for name, x in self.tensors.items()}
        if draws:
            self._at.add_(1)
        return draws
