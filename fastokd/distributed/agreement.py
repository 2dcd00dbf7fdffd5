"""What ranks do at the same moment though only one of them wishes it: save, or stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastokd.distributed.ranks import Ranks


class Agreement:
    """Called at the same moments on all ranks; each call answers what was wished at the last.

    The wishes travel on the CPU while the step in between is computed, so that nobody waits for
    them, nor a host for its GPU.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.wishes = torch.zeros(2, dtype=torch.int64)
        self.sent: Any = None

    def __call__(self, due: bool, signum: int) -> tuple[bool, int]:
        """Whether a rank found it time to save, and the signal that one received or 0."""
        if self.ranks.size == 1:
            return due, signum
        agreed = (0, 0)
        if self.sent is not None:
            self.sent.wait()
            agreed = (int(self.wishes[0]), int(self.wishes[1]))
        # What is granted now isn't wished for once more.
        self.wishes = torch.tensor([int(due and not agreed[0]), 0 if agreed[1] else signum])
        self.sent = dist.all_reduce(
            self.wishes, op=dist.ReduceOp.MAX, group=self.ranks.side, async_op=True
        )
        return bool(agreed[0]), agreed[1]
