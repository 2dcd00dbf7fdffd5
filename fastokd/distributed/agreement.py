"""Agreement of the ranks to save or to stop between the same two steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastokd.distributed.ranks import Ranks


class Agreement:
    """Called between the same steps on all ranks; each call returns what was requested in the last one.

    The requests are reduced on the CPU during the step in between, so no rank waits for them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.wishes = torch.zeros(2, dtype=torch.int64)
        self.sent: Any = None

    def __call__(self, due: bool, signum: int) -> tuple[bool, int]:
        """Whether a rank requested to save, and a signal that a rank received or 0."""
        if self.ranks.size == 1:
            return due, signum
        agreed = (0, 0)
        if self.sent is not None:
            self.sent.wait()
            agreed = (int(self.wishes[0]), int(self.wishes[1]))
        # A request that is granted now isn't sent again.
        self.wishes = torch.tensor([int(due and not agreed[0]), 0 if agreed[1] else signum])
        self.sent = dist.all_reduce(
            self.wishes, op=dist.ReduceOp.MAX, group=self.ranks.side, async_op=True
        )
        return bool(agreed[0]), agreed[1]
