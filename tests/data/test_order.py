"""Which samples a batch holds: each once, shared evenly, the same on any number of ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

from fastokd.data import Split, stream_of
from fastokd.data.order import BatchOrder, balanced, epoch_length, members
from fastokd.errors import UserError
from fastokd.seeds import keyed_generator

TRAIN = {"seed": 3, "shuffle": True, "drop_last": False}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_equal_shares_of_the_batches_of_one_process(world_size: int) -> None:
    """143 samples in batches of 24: the last holds 23, and 8 ranks train on 16 of them."""
    one = BatchOrder(143, 24, **TRAIN)
    ranks = [
        BatchOrder(143, 24, **TRAIN, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for epoch in (0, 1):
        seen = []
        for index in range(len(one)):
            whole = one.samples(epoch, index)
            shares = [order.samples(epoch, index) for order in ranks]
            assert len({len(share) for share in shares}) == 1
            together = torch.cat(shares)
            assert torch.equal(together, whole[: len(together)])
            seen += together.tolist()
        assert len(seen) == len(set(seen)) == 143 - 23 % world_size


def test_a_last_batch_smaller_than_the_ranks_is_left_out_where_shares_must_be_equal() -> None:
    assert len(BatchOrder(51, 16, **TRAIN, world_size=4)) == 3
    assert len(BatchOrder(51, 16, **TRAIN | {"shuffle": False}, world_size=4)) == 4


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_sees_every_sample_once(world_size: int) -> None:
    """More ranks than the last batch has samples: some have none of it."""
    seen = [
        order.samples(0, index)
        for rank in range(world_size)
        for order in [
            BatchOrder(
                27, 8, seed=0, shuffle=False, drop_last=False, rank=rank, world_size=world_size
            )
        ]
        for index in range(len(order))
    ]
    assert sorted(torch.cat(seen).tolist()) == list(range(27))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("count", "batch_size", "repeats"), [(700, 64, 3), (700, 64, 2), (90, 16, 3)]
)
def test_repeats_are_timms(count: int, batch_size: int, repeats: int, world_size: int) -> None:
    """Of one shuffled order, its ranks' samples of a step are those of a batch; so is an epoch's end."""
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    with patch.object(torch, "randperm", lambda *_args, **_kwargs: order_N):
        ours = BatchOrder(count, batch_size, **TRAIN, repeats=repeats)
        assert ours.seen == epoch_length(count, repeats)
        ranks = [
            list(RepeatAugSampler(range(count), world_size, rank, num_repeats=repeats))
            for rank in range(world_size)
        ]
        assert world_size * len(ranks[0]) - ours.seen in range(world_size)
        share = batch_size // world_size
        for index in range(ours.seen // batch_size):
            theirs = [one for rank in ranks for one in rank[index * share : (index + 1) * share]]
            assert sorted(ours.samples(0, index).tolist()) == sorted(theirs)


def test_the_copies_of_an_image_go_to_different_ranks() -> None:
    ranks = [BatchOrder(700, 63, **TRAIN, repeats=3, rank=r, world_size=3) for r in range(3)]
    for index in range(8):
        parts = [order.samples(1, index).tolist() for order in ranks]
        assert all(len(set(part)) == 21 for part in parts)
        assert len({*parts[0], *parts[1], *parts[2]}) == 21


def test_an_epoch_with_repeats_is_another_each_time() -> None:
    order = BatchOrder(700, 64, **TRAIN, repeats=3)
    first, second = (torch.cat([order.samples(e, i) for i in range(8)]) for e in (0, 1))
    again = BatchOrder(700, 64, **TRAIN, repeats=3)
    assert torch.equal(torch.cat([again.samples(0, i) for i in range(8)]), first)
    assert len(first.unique()) == 171  # a third of 512, and two copies of the last
    assert not torch.equal(first, second)
    with pytest.raises(
        UserError, match="batch size is 600, but there are 512 images in an epoch with 3 repeats"
    ):
        BatchOrder(700, 600, **TRAIN, repeats=3)


def imbalanced() -> Tensor:
    """Classes of 900, 90, 0 and 10 samples, in no order."""
    labels_N = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    return labels_N[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]


def test_balanced_batches_draw_each_class_and_each_of_its_samples_equally_often() -> None:
    labels_N = imbalanced()
    drawn = torch.cat(
        [balanced(members(labels_N), keyed_generator(0, epoch)) for epoch in range(60)]
    )
    count_N = torch.bincount(drawn, minlength=1000).double()
    for label, size in ((0, 900), (1, 90), (3, 10)):
        of_class = count_N[labels_N == label]
        assert abs(of_class.sum() / 60_000 - 1 / 3) < 0.01
        # Poisson's deviation is the mean's root.
        mean = 20_000 / size
        assert abs(of_class - mean).max() < 6 * mean**0.5
        assert 0.5 < of_class.std() / mean**0.5 < 1.5


@pytest.mark.parametrize("world_size", [1, 2])
def test_balanced_epochs_are_keyed_and_shared(world_size: int) -> None:
    labels_N = imbalanced()
    split = Split(torch.zeros(1000, 4, 4, 3, dtype=torch.uint8), labels_N)
    how: dict[str, Any] = {"seed": 3, "shuffle": True, "balanced": True}
    one = stream_of(split, 100, **how)
    ranks = [
        stream_of(split, 100, **how, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len(one) == 10
    labels = torch.cat([one.batch(0, index)[1] for index in range(10)])
    assert (torch.bincount(labels, minlength=4)[[0, 1, 3]] > 250).all()
    for index in range(10):
        together = torch.cat([rank.batch(1, index)[1] for rank in ranks])
        assert torch.equal(together, one.batch(1, index)[1])
    assert not torch.equal(one.batch(1, 0)[1], one.batch(0, 0)[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_has_so_many_images_of_each_of_its_classes(world_size: int) -> None:
    """Its classes are drawn anew, ranks share them, and no image comes twice in a batch."""
    labels_N = torch.arange(130) % 13
    how: dict[str, Any] = {**TRAIN, "labels_N": labels_N, "images_per_class": 3}
    one, again = BatchOrder(130, 18, **how), BatchOrder(130, 18, **how)
    ranks = [BatchOrder(130, 18, **how, rank=r, world_size=world_size) for r in range(world_size)]
    assert (len(one), one.seen) == (7, 126)
    assert torch.equal(again.samples(1, 3), one.samples(1, 3))
    assert not torch.equal(again.samples(2, 3), one.samples(1, 3))
    classes = set()
    for index in range(len(one)):
        samples = one.samples(0, index)
        assert one.size(index) == len(samples) == len(samples.unique()) == 18
        classes.add(tuple(sorted(labels_N[samples].unique().tolist())))
        shares = [rank.samples(0, index) for rank in ranks]
        assert torch.equal(torch.cat(shares), samples)
        for share in shares:
            assert set(torch.bincount(labels_N[share]).tolist()) <= {0, 3}
    assert len(classes) > 1


def test_every_class_and_every_image_of_it_comes_equally_often() -> None:
    labels_N = torch.tensor([0] * 4 + [1] * 40 + [2] * 7)
    order = BatchOrder(51, 6, **TRAIN, labels_N=labels_N, images_per_class=3)
    epochs = [[order.samples(e, i) for i in range(len(order))] for e in range(400)]
    drawn = torch.cat([samples for epoch in epochs for samples in epoch])
    count_N = torch.bincount(drawn, minlength=51).double()
    for label, size in enumerate((4, 40, 7)):
        of_class, mean = count_N[labels_N == label], len(drawn) / 3 / size
        assert abs(of_class.sum() / len(drawn) - 1 / 3) < 0.02
        assert abs(of_class - mean).max() < 6 * mean**0.5


@pytest.mark.parametrize(
    ("batch_size", "per_class", "world_size", "says"),
    [
        (10, 3, 1, "images_per_class is 3, but a batch has 10 images: choose a divisor"),
        (14, 1, 1, "a batch of 14 has 14 classes, but there are 13: choose a larger"),
        (22, 11, 1, "images_per_class is 11, but a class has 10 images: choose at most"),
        (6, 2, 2, "2 images of each of 3 classes, which 2 ranks can't share evenly"),
    ],
)
def test_classes_that_no_batch_can_have(
    batch_size: int, per_class: int, world_size: int, says: str
) -> None:
    labels_N = torch.arange(130) % 13
    with pytest.raises(UserError, match=says):
        BatchOrder(
            130,
            batch_size,
            **TRAIN,
            labels_N=labels_N,
            images_per_class=per_class,
            world_size=world_size,
        )
