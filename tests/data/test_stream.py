"""Batches: any one can be made again; crop and flip equal those of one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data import Augment, BatchStream, Split, stream_of
from fastokd.errors import UserError


def make_split(N: int = 23, H: int = 8, W: int = 6) -> Split:
    """Random images; each label is the image's index, so that a batch says what it holds."""
    return Split(torch.randint(256, (N, H, W, 3), dtype=torch.uint8), torch.arange(N))


def one_image(image_HWC: Tensor, augment: Augment, top: int, left: int, flip: int) -> Tensor:
    """Pad, crop and flip of one image, written plainly."""
    H, W, _ = image_HWC.shape
    p = augment.crop_padding
    mode = "constant" if augment.padding_mode == "zeros" else "reflect"
    padded_CHW = F.pad(image_HWC.permute(2, 0, 1).float(), (p, p, p, p), mode=mode)
    crop_CHW = padded_CHW[:, top : top + H, left : left + W]
    crop_CHW = crop_CHW.flip(2) if flip else crop_CHW
    return crop_CHW.permute(1, 2, 0).to(torch.uint8)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=4, padding_mode="zeros", flip=True),
        Augment(crop_padding=4, padding_mode="reflect", flip=True),
        # The largest that six columns can reflect.
        Augment(crop_padding=5, padding_mode="reflect", flip=False),
        Augment(crop_padding=0, flip=True),
        Augment(crop_padding=3, flip=False),
    ],
)
def test_equals_one_image_at_a_time(augment: Augment) -> None:
    split = make_split()
    stream = stream_of(split, 7, seed=3, augment=augment, shuffle=True)
    for index in range(len(stream)):
        images_BHWC, labels_B = stream.batch(2, index)
        draws = stream.draws(2, index)
        assert torch.equal(labels_B, draws.index_B)
        expected = [
            one_image(split.images_NHWC[i], augment, top, left, flip)
            for i, top, left, flip in zip(*(d.tolist() for d in draws), strict=True)
        ]
        assert torch.equal(images_BHWC, torch.stack(expected))
        assert images_BHWC.dtype == torch.uint8
        assert images_BHWC.is_contiguous()


def test_draws_are_uniform() -> None:
    """Every corner and both sides come, each about as often as it should."""
    stream = stream_of(make_split(4000, 4, 4), 4000, augment=Augment(crop_padding=2), shuffle=True)
    draws = stream.draws(0, 0)
    for corner_B in (draws.top_B, draws.left_B):
        counts = torch.bincount(corner_B)
        assert len(counts) == 5
        # 800 expected, 25 its deviation.
        assert counts.min() > 700
        assert counts.max() < 900
    assert 1850 < int(draws.flip_B.sum()) < 2150
    together = torch.corrcoef(torch.stack([d.double() for d in draws[1:]])) - torch.eye(3)
    assert together.abs().max() < 0.08


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("augment", [None, Augment(crop_padding=1)])
def test_an_epoch_has_every_image_once(augment: Augment | None, drop_last: bool) -> None:
    stream = stream_of(make_split(23), 5, augment=augment, shuffle=True, drop_last=drop_last)
    seen = [labels_B for _, labels_B in stream.batches(0)]
    assert len(seen) == len(stream) == (4 if drop_last else 5)
    assert [len(labels_B) for labels_B in seen] == [5, 5, 5, 5] + ([] if drop_last else [3])
    assert len(torch.cat(seen).unique()) == (20 if drop_last else 23)


def test_any_batch_can_be_made_again() -> None:
    split = make_split()

    def fresh() -> BatchStream:
        stream = stream_of(split, 5, seed=7, augment=Augment(crop_padding=2), shuffle=True)
        assert isinstance(stream, BatchStream)
        return stream

    whole = [list(fresh().batches(epoch)) for epoch in range(3)]
    jumping = fresh()
    for epoch, index in ((2, 3), (0, 0), (2, 1), (1, 4)):
        for one, other in zip(jumping.batch(epoch, index), whole[epoch][index], strict=True):
            assert torch.equal(one, other)
    resumed = list(jumping.batches(1, start_batch=3))
    assert [y.tolist() for _, y in resumed] == [y.tolist() for _, y in whole[1][3:]]


def test_draws_are_frozen() -> None:
    """Another draw from the same seed would silently end every run's reproducibility."""
    stream = stream_of(make_split(), 4, seed=1, augment=Augment(), shuffle=True)
    assert [d.tolist() for d in stream.draws(2, 1)] == FROZEN


FROZEN = [[3, 13, 21, 19], [1, 1, 0, 3], [4, 3, 1, 7], [0, 1, 1, 1]]


def test_order_and_draws_depend_on_seed_and_epoch() -> None:
    split = make_split()
    seen = set()
    for seed in (0, 1):
        stream = stream_of(split, 23, seed=seed, augment=Augment(), shuffle=True)
        for epoch in (0, 1):
            draws = stream.draws(epoch, 0)
            seen |= {tuple(draws.index_B.tolist()), tuple(draws.top_B.tolist())}
            assert draws.index_B.tolist() != list(range(23))
    assert len(seen) == 8
    small = stream_of(split, 10, augment=Augment(), shuffle=True)
    assert not torch.equal(small.draws(0, 0).top_B, small.draws(0, 1).top_B)


def test_global_generator_is_left_alone() -> None:
    split = make_split()
    state = torch.get_rng_state()
    list(stream_of(split, 5, augment=Augment(), shuffle=True).batches(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_in_order_and_whole() -> None:
    split = make_split()
    stream = stream_of(split, 10)
    images, labels = zip(*stream.batches(4), strict=True)
    assert [len(labels_B) for labels_B in labels] == [10, 10, 3]
    assert torch.equal(torch.cat(images), split.images_NHWC)
    assert torch.equal(torch.cat(labels), split.labels_N)
    ((whole_BHWC, _),) = stream_of(split, 1000).batches(0)
    assert torch.equal(whole_BHWC, split.images_NHWC)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(world_size: int) -> None:
    split = make_split(22)
    options = {"seed": 5, "augment": Augment(crop_padding=2), "shuffle": True}
    one = stream_of(split, 6, **options)  # type: ignore[arg-type]
    ranks = [
        stream_of(split, 6, **options, rank=rank, world_size=world_size)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]
    assert {len(stream) for stream in ranks} == {len(one)}
    for index in range(len(one)):
        parts = [stream.batch(3, index) for stream in ranks]
        for whole, shares in zip(one.batch(3, index), zip(*parts, strict=True), strict=True):
            # Shares are equal: of a last batch of 4, three ranks train on 3.
            if len(whole) % world_size == 0:
                assert torch.equal(torch.cat(shares), whole)
            assert {len(share) for share in shares} == {len(whole) // world_size}


def test_ranks_share_evaluation_too() -> None:
    split = make_split(23)
    parts = [
        labels_B
        for rank in range(4)
        for _, labels_B in stream_of(split, 6, rank=rank, world_size=4).batches(0)
    ]
    assert sorted(torch.cat(parts).tolist()) == list(range(23))


def test_split_follows_its_device() -> None:
    moved = make_split().to("meta")
    images_BHWC, labels_B = stream_of(moved, 5, augment=Augment(), shuffle=True).batch(0, 4)
    assert images_BHWC.device.type == labels_B.device.type == "meta"
    assert images_BHWC.shape == (3, 8, 6, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 24, "shuffle": True}, "batch size is 24, but there are 23 images"),
        ({"batch_size": 24, "drop_last": True}, "batch size is 24, but there are 23 images"),
        ({"batch_size": 8, "shuffle": True, "world_size": 3}, "choose a multiple of 3"),
        ({"batch_size": 8, "augment": Augment(6, "reflect")}, "crop_padding is 6"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        stream_of(make_split(), **options)  # type: ignore[arg-type]


def test_empty_split_is_named() -> None:
    with pytest.raises(UserError, match="the split is empty"):
        stream_of(make_split(0), 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"crop_padding": -1}, "crop_padding is -1"), ({"padding_mode": "wrap"}, "'wrap'")],
)
def test_bad_augmentation_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Augment(**options)  # type: ignore[arg-type]
