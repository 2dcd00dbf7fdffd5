"""The samples of each batch on each rank, a function of (seed, epoch, batch)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.seeds import keyed_generator


class BatchOrder:
    """The batches of ``count`` samples.

    Args:
        count: the number of samples.
        batch_size: samples of one step over all ranks. Rank r of W takes the r-th of W nearly equal
            slices of every batch, so that the batches don't depend on the number of ranks.
        seed: of the order.
        shuffle: a new order for each epoch; else the set's own.
        drop_last: leaves out the last batch if it isn't full.
        rank, world_size: this process and the number of processes. If shuffled, up to
            ``world_size`` - 1 samples are cut from the last batch, so that all ranks' shares are equal.

    Raises:
        UserError: there are no samples; a batch is smaller than 1 or, with ``shuffle`` or
            ``drop_last``, larger than the set; or ``world_size`` doesn't divide a shuffled batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        if count == 0:
            raise UserError("the split is empty: give it at least one image")
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}: it must be at least 1")
        if batch_size > count and (shuffle or drop_last):
            raise UserError(
                f"batch size is {batch_size}, but there are {count} images: choose at most {count}"
            )
        if shuffle and batch_size % world_size:
            raise UserError(
                f"batch size is {batch_size}, which {world_size} ranks can't share evenly: "
                f"choose a multiple of {world_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self._samples = count
        last = count % batch_size
        # Samples of an epoch.
        self.seen = count - (last if drop_last else last % world_size if shuffle else 0)
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.seen // self.batch_size)

    def size(self, index: int) -> int:
        """Samples of batch ``index`` over all ranks."""
        assert 0 <= index < len(self)
        return min(self.batch_size, self.seen - index * self.batch_size)

    def share(self, index: int) -> slice:
        """This rank's slice of batch ``index``."""
        B = self.size(index)
        return slice(self.rank * B // self.world_size, (self.rank + 1) * B // self.world_size)

    def span(self, index: int) -> slice:
        """This rank's slice of the epoch's order for batch ``index``."""
        first, share = index * self.batch_size, self.share(index)
        return slice(first + share.start, first + share.stop)

    @property
    def largest_share(self) -> int:
        """The most samples of a batch on one rank."""
        return -(-self.batch_size // self.world_size)

    def samples(self, epoch: int, index: int) -> Tensor:
        """The indices of this rank's samples of batch ``index``, int64 ``[B]``."""
        span = self.span(index)
        if not self.shuffle:
            return torch.arange(span.start, span.stop)
        if self._order is None or self._order[0] != epoch:
            generator = keyed_generator(self.seed, epoch, "order")
            self._order = (epoch, torch.randperm(self._samples, generator=generator))
        return self._order[1][span]

    def generator(self, epoch: int, index: int, view: int = 0) -> torch.Generator:
        """The generator of one view of batch ``index``. Draw for the whole batch and take this rank's
        :meth:`share`."""
        more = ("view", view) if view else ()
        return keyed_generator(self.seed, epoch, index, *more)
