"""Which samples a batch holds: each once, shared evenly, the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from fastokd.data.order import BatchOrder

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
