"""One step on every rank's share of the batch: torch's DistributedDataParallel over the cohort.

Each rank's loss is a mean over its share. Shares are equal, so that the mean of the ranks'
gradients, which DDP makes, is the gradient of the batch's mean. Where a loss isn't such a mean, or
a norm looks at the batch, a rank sees its own share (docs/distributed.md names the methods).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastokd.methods import Method


class Replicas:
    """Calls ``forward`` as it is, and has DDP average the gradients that follow.

    DDP is made at the first call: inside the step, so that a captured one makes it on the side
    stream where the capture will be; and never by ranks that only evaluate.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        cohort: nn.Module,
        method: Method,
        group: Any,
        *,
        accumulates: bool,
    ) -> None:
        """``group``: the ranks that share a batch; ``accumulates``: a batch is taken in parts."""
        self.watched = _Watched(forward, cohort, method)
        self.ddp: DistributedDataParallel | None = None
        # In a static graph the parts of a batch can't keep their gradients back.
        self.options: dict[str, Any] = {
            "process_group": group,
            "gradient_as_bucket_view": True,
            "static_graph": not accumulates,
            "find_unused_parameters": accumulates,
            _BUFFERS: method.needs.running_statistics,
        }

    def __call__(self, *args: Any) -> Any:
        return self._made()(*args)

    def apart(self) -> AbstractContextManager[Any]:
        """Within it gradients only add up: a later part of the batch sends them."""
        return self._made().no_sync()

    def _made(self) -> DistributedDataParallel:
        if self.ddp is None:
            self.ddp = DistributedDataParallel(self.watched, **self.options)
        return self.ddp


# The papers' loops ran DataParallel, which keeps the running statistics of the first GPU's share.
# So the first rank's count: they are handed out before an evaluation, and every step only where a
# method reads them while it trains. DDP's own name for that has changed.
_NEW = "forward_sync_buffers"
_BUFFERS = (
    _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
)


class _Watched(nn.Module):
    """What DDP watches: everything trained, and the function that runs it."""

    def __init__(self, forward: Callable[..., Any], cohort: nn.Module, method: nn.Module) -> None:
        super().__init__()
        self.cohort = cohort
        self.method = method
        self.run = forward

    def forward(self, *args: Any) -> Any:
        return self.run(*args)
