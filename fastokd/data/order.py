"""The samples of each batch on each rank, a function of (seed, epoch, batch)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.seeds import keyed_generator

# The samples of an epoch with repeats are a multiple of this, as published.
ROUND = 256


class BatchOrder:
    """The batches of ``count`` samples.

    Args:
        count: the number of samples.
        batch_size: samples of one step over all ranks. Rank r of W takes the r-th of W nearly equal
            slices of every batch, so that the batches don't depend on the number of ranks.
        seed: of the order.
        shuffle: a new order for each epoch; else the set's own.
        drop_last: leaves out the last batch if it isn't full.
        repeats: how often an image of a shuffled epoch comes (:func:`repeated`).
        labels_N: class ids; each sample is then drawn anew, with equal probability for every class
            (:func:`balanced`).
        images_per_class: with ``labels_N``, each batch has so many images of each of its classes instead,
            which are drawn anew for every batch (:func:`grouped`); 0: not. A last batch that isn't full is
            left out.
        rank, world_size: this process and the number of processes. If shuffled, up to
            ``world_size`` - 1 samples are cut from the last batch, so that all ranks' shares are equal.

    Raises:
        UserError: there are no samples; a batch is smaller than 1 or, with ``shuffle`` or
            ``drop_last``, larger than the set; ``world_size`` doesn't divide a shuffled batch; or the
            classes of a batch are more than there are, or one of them has too few images.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        repeats: int = 1,
        labels_N: Tensor | None = None,
        images_per_class: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert shuffle or (repeats == 1 and labels_N is None)
        if count == 0:
            raise UserError("the split is empty: give it at least one image")
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}: it must be at least 1")
        whole = epoch_length(count, repeats)
        if batch_size > whole and (shuffle or drop_last):
            of = "" if whole == count else f" in an epoch with {repeats} repeats"
            raise UserError(
                f"batch size is {batch_size}, but there are {whole} images{of}: choose at most {whole}"
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
        self.repeats = repeats
        self._samples = count
        self._members = None if labels_N is None else members(labels_N)
        self._per_class = images_per_class
        if images_per_class:
            assert self._members is not None
            check_groups(self._members, batch_size, images_per_class, world_size)
        last = whole % batch_size
        # Samples of an epoch.
        self.seen = whole - (
            last if drop_last or images_per_class else last % world_size if shuffle else 0
        )
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
            self._order = (epoch, self._shuffled(epoch))
        return self._order[1][span]

    def _shuffled(self, epoch: int) -> Tensor:
        """The samples of an epoch, int64."""
        if self._members is not None and self._per_class:
            generator = keyed_generator(self.seed, epoch, "grouped")
            groups = self.batch_size // self._per_class
            return grouped(self._members, len(self), groups, self._per_class, generator)
        if self._members is not None:
            return balanced(self._members, keyed_generator(self.seed, epoch, "balanced"))
        generator = keyed_generator(self.seed, epoch, "order")
        order_N = torch.randperm(self._samples, generator=generator)
        return order_N if self.repeats == 1 else repeated(order_N, self.repeats, self.batch_size)

    def generator(self, epoch: int, index: int, *what: str, view: int = 0) -> torch.Generator:
        """The generator of ``what`` in one view of batch ``index``. Draw for the whole batch and take this
        rank's :meth:`share`."""
        more = ("view", view) if view else ()
        return keyed_generator(self.seed, epoch, index, *what, *more)


def epoch_length(count: int, repeats: int) -> int:
    """Samples of a shuffled epoch of ``count`` images: all; with repeats the largest multiple of 256, or
    all where there are fewer. An epoch thus sees 1 / ``repeats`` of the images."""
    return count // ROUND * ROUND if repeats > 1 and count >= ROUND else count


def repeated(order_N: Tensor, repeats: int, batch_size: int) -> Tensor:
    """Repeated augmentation (Hoffer et al., 2020): a batch holds each image ``repeats`` times.

    The batches hold the samples that timm's ``RepeatAugSampler`` gives to all its ranks at a step. Within
    a batch the copies stand apart, so that ranks, which take slices, get different copies.
    """
    M = epoch_length(len(order_N), repeats)
    copies_M = order_N[: -(-M // repeats)].repeat_interleave(repeats)[:M]
    batches = copies_M.split(batch_size)
    return torch.cat([batch[first::repeats] for batch in batches for first in range(repeats)])


def members(labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples sorted by class, ``[N]``; and of each class that has some, the place of its first one
    and its number of samples, ``[C]``. int64, on the CPU."""
    labels_N = labels_N.cpu()
    count_C = torch.bincount(labels_N)
    first_C = count_C.cumsum(0) - count_C
    return labels_N.argsort(stable=True), first_C[count_C > 0], count_C[count_C > 0]


def balanced(of: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """As many samples as there are, drawn with replacement: a class uniformly, then one of its samples.

    The distribution is that of torch's ``WeightedRandomSampler`` with the weight 1 / (size of the class).
    """
    sorted_N, first_C, count_C = of
    N = len(sorted_N)
    class_N = torch.randint(len(count_C), (N,), generator=generator)
    place_N = torch.rand(N, dtype=torch.float64, generator=generator) * count_C[class_N]
    return sorted_N[first_C[class_N] + place_N.long()]


def check_groups(
    of: tuple[Tensor, Tensor, Tensor], batch_size: int, per_class: int, world_size: int
) -> None:
    """Raises UserError where a batch can't have ``per_class`` images of each of its classes."""
    _, _, count_C = of
    classes, rest = divmod(batch_size, per_class)
    if rest:
        raise UserError(
            f"images_per_class is {per_class}, but a batch has {batch_size} images: choose a divisor of it"
        )
    if classes % world_size:
        raise UserError(
            f"a batch has {per_class} images of each of {classes} classes, which {world_size} ranks can't "
            "share evenly: choose another batch_size or images_per_class"
        )
    if classes > len(count_C):
        raise UserError(
            f"images_per_class is {per_class}, so that a batch of {batch_size} has {classes} classes, but "
            f"there are {len(count_C)}: choose a larger images_per_class or a smaller batch_size"
        )
    if count_C.min() < per_class:
        raise UserError(
            f"images_per_class is {per_class}, but a class has {int(count_C.min())} images: choose at most "
            "as many"
        )


def grouped(
    of: tuple[Tensor, Tensor, Tensor],
    batches: int,
    classes: int,
    per_class: int,
    generator: torch.Generator,
) -> Tensor:
    """The samples of ``batches``, each of so many different classes, with ``per_class`` different samples of
    each, one class after another (MCL's batches)."""
    sorted_N, first_C, count_C = of
    # The classes of a batch are the first of an order of all.
    keys = torch.rand(batches, len(count_C), generator=generator)
    class_M = keys.argsort(1)[:, :classes].reshape(-1)
    count_M = count_C[class_M]
    # Floyd's algorithm: the j-th of n - k + j + 1 places, or the last of them where it is taken already.
    places_Mk = torch.empty(len(class_M), per_class, dtype=torch.long)
    for j in range(per_class):
        last_M = count_M - per_class + j
        u_M = torch.rand(len(class_M), dtype=torch.float64, generator=generator)
        place_M = (u_M * (last_M + 1)).long()
        taken_M = (places_Mk[:, :j] == place_M[:, None]).any(1)
        places_Mk[:, j] = torch.where(taken_M, last_M, place_M)
    return sorted_N[first_C[class_M][:, None] + places_Mk].reshape(-1)
