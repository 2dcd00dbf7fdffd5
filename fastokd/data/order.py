"""Which samples each batch holds, on each rank: a function of (seed, epoch, batch) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.seeds import keyed_generator


class BatchOrder:
    """The batches of ``count`` samples, epoch after epoch, as positions in an epoch's order.

    Args:
        count: samples of the set.
        batch_size: samples of one step over all ranks. Rank r of W takes the r-th of W nearly equal
            slices of every batch, so that a run sees the same batches on any number of ranks.
        seed: of the order.
        shuffle: a new order for each epoch, else the set's own.
        drop_last: leaves out the last batch where it isn't full.
        rank, world_size: this process and how many there are. Shuffled, the last batch is cut, by
            ``world_size`` - 1 samples at most, so that the ranks have equal shares of it too.

    Raises:
        UserError: no samples; a batch below 1, or, shuffled or with ``drop_last``, larger than the
            set; a shuffled batch that ``world_size`` doesn't divide.
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
        # Samples that an epoch sees.
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
        """This rank's part of batch ``index``, counted from the batch's first sample."""
        B = self.size(index)
        return slice(self.rank * B // self.world_size, (self.rank + 1) * B // self.world_size)

    def span(self, index: int) -> slice:
        """This rank's part of batch ``index``, as positions in the epoch's order."""
        first, share = index * self.batch_size, self.share(index)
        return slice(first + share.start, first + share.stop)

    @property
    def largest_share(self) -> int:
        """Samples that a rank has of a batch at most."""
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

    def generator(self, epoch: int, index: int) -> torch.Generator:
        """For the draws of the whole of batch ``index``: each rank takes its :meth:`share`."""
        return keyed_generator(self.seed, epoch, index)
