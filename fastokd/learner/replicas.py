"""Data parallelism: DistributedDataParallel over the cohort and the method.

Each rank's loss is a mean over its share of the batch. The shares are equal, so the mean of the ranks'
gradients is the gradient of the batch mean. Losses that aren't such a mean, and norms, see the rank's
own share (docs/distributed.md names the methods).
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
    """Calls ``forward`` inside DDP, which averages the gradients in its backward.

    DDP is made at the first call, inside the step: a captured step then makes it on the capture's side
    stream, and ranks that only evaluate never make it.
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
        # DDP's static graph doesn't support no_sync.
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
        """Within it gradients accumulate locally; a later part of the batch averages them."""
        return self._made().no_sync()

    def _made(self) -> DistributedDataParallel:
        if self.ddp is None:
            self.ddp = DistributedDataParallel(self.watched, **self.options)
        return self.ddp


# The papers' loops use DataParallel, which keeps the running statistics of the first GPU's share. So
# rank 0's are broadcast before an evaluation, and in every step only where a method reads them while it
# trains. The name of DDP's option has changed.
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
