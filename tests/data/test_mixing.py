"""Mixup and CutMix: torchvision's and timm's numbers on the same draws; draws of the right distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timm_mixup
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from fastokd.data.mixing import Mixing, boxes, dominant

B, H, W, C = 6, 11, 14, 5
SIZE = (H, W)
WHOLE = slice(0, B)


def batch(*views: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (*views, B, H, W, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(dtype)
    return images, torch.randint(C, (B,), generator=generator)


def columns(weight: Any, box: Any = (0, 0, 0, 0), partner_B: Tensor | None = None) -> Tensor:
    """``mix_6B`` of one weight and one box for all images."""
    partner_B = torch.arange(B).flip(0) if partner_B is None else partner_B
    rows = [torch.full((B,), float(value), dtype=torch.float64) for value in (weight, *box)]
    return torch.stack([*rows, partner_B.double()])


def soft(labels_B: Tensor, mixed_with: tuple[Tensor, Tensor]) -> Tensor:
    """The mixed labels ``[B, C]``."""
    labels2_B, share2_B = mixed_with
    one_BC, two_BC = (F.one_hot(labels, C).double() for labels in (labels_B, labels2_B))
    return (1 - share2_B[:, None]) * one_BC + share2_B[:, None] * two_BC


def first(images_BHWC: Tensor) -> Tensor:
    return images_BHWC.movedim(-1, -3)


def last(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.movedim(-3, -1)


ROLLED = torch.arange(B).roll(1)


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_equals_torchvision(name: str) -> None:
    """Its partner is the image before; its box has another size than timm's, for the same lambda."""
    images, labels_B = batch()
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = getattr(v2, name)(alpha=0.8, num_classes=C)
        params = theirs.make_params([first(images)])
        torch.manual_seed(seed)
        wanted, wanted_BC = theirs(first(images), labels_B)
        if name == "MixUp":
            mixing, mix_6B = Mixing(mixup=0.8), columns(1 - params["lam"], partner_B=ROLLED)
        else:
            x1, y1, x2, y2 = params["box"]
            mixing, mix_6B = Mixing(cutmix=0.8), columns(0, (y1, y2, x1, x2), ROLLED)
        mixed, mixed_with = mixing(mix_6B, images, labels_B)
        torch.testing.assert_close(mixed, last(wanted), rtol=0, atol=1e-9)
        # Its labels are float32.
        torch.testing.assert_close(
            soft(labels_B, mixed_with), wanted_BC.double(), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_equals_timm(alphas: tuple[float, float], mode: str) -> None:
    """With lambda, box and choice of one seed; its partner is the image at the mirrored place."""
    images, labels_B = batch()
    kinds = set()
    for seed in range(20):
        theirs = timm_mixup.Mixup(
            *alphas, prob=0.9, switch_prob=0.5, mode=mode, label_smoothing=0.0, num_classes=C
        )
        np.random.seed(seed)
        mix_6B = timms_draws(theirs)
        kinds |= {(bool(weight), bool(bottom)) for weight, _, bottom, *_ in mix_6B.T.tolist()}
        np.random.seed(seed)
        with pytest.MonkeyPatch.context() as patch:  # it puts labels on a GPU
            patch.setattr(timm_mixup, "mixup_target", lambda labels, C, lam, *_: (labels, lam))
            wanted, (_, lam) = theirs(first(images).clone(), labels_B)
        mixed, mixed_with = Mixing(*alphas)(mix_6B, images, labels_B)
        torch.testing.assert_close(
            mixed, last(wanted), rtol=0, atol=2e-5 if mode == "elem" else 1e-9
        )
        share_B = 1 - torch.as_tensor(lam).double().flatten().expand(B)
        torch.testing.assert_close(mixed_with[1], share_B, rtol=0, atol=1e-6)
        assert torch.equal(mixed_with[0], labels_B.flip(0))
    wanted_kinds = {
        (False, False),
        (alphas[0] > 0, alphas[0] == 0),
        (alphas[1] == 0, alphas[1] > 0),
    }
    assert kinds == wanted_kinds


def timms_draws(theirs: timm_mixup.Mixup) -> Tensor:
    """The draws that timm makes from NumPy's global generator, as ``mix_6B``."""
    if theirs.mode == "batch":
        lam, cuts = theirs._params_per_batch()
        lams, use_cutmix = [lam], [cuts]
    else:
        lams, use_cutmix = theirs._params_per_elem(B)
    found = []
    for lam, cuts in zip(lams, use_cutmix, strict=True):
        if lam == 1 or not cuts:
            found.append([1 - float(lam), 0, 0, 0, 0])
        else:
            box, _ = timm_mixup.cutmix_bbox_and_lam((3, H, W), lam)
            found.append([0, *box])
    rows_5B = torch.tensor(found, dtype=torch.float64).T.expand(5, B)
    return torch.cat((rows_5B, torch.arange(B).flip(0)[None].double()))


def test_boxes_are_timms() -> None:
    generator = np.random.default_rng(0)
    for lam in generator.random(50):
        seed = int(generator.integers(1000))
        np.random.seed(seed)
        wanted = timm_mixup.rand_bbox((3, H, W), lam)
        np.random.seed(seed)
        centre_21 = np.array([[np.random.randint(H)], [np.random.randint(W)]])
        assert boxes(np.array([1 - lam]), centre_21, SIZE)[:, 0].tolist() == [*wanted]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_grey_levels_are_the_nearest(mixup: float, cutmix: float) -> None:
    mixing = Mixing(mixup, cutmix, each=True)
    exact, labels_B = batch()
    images = exact.to(torch.uint8)
    for index in range(20):
        mix_6B = mixing.draw(0, index, B, WHOLE, SIZE)
        mixed, (labels2_B, share2_B) = mixing(mix_6B, images, labels_B)
        wanted, (_, exact_B) = mixing(mix_6B, exact, labels_B)
        assert mixed.dtype == torch.uint8
        assert share2_B.dtype == torch.float32
        torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=0.5 + 1e-4)
        torch.testing.assert_close(share2_B.double(), exact_B, rtol=0, atol=1e-7)
        assert torch.equal(labels2_B, labels_B[[1, 0, 3, 2, 5, 4]])


@pytest.mark.parametrize("each", [False, True])
def test_all_views_of_an_image_have_one_partner(each: bool) -> None:
    mixing = Mixing(0.8, 1.0, each=each)
    views, labels_B = batch(2, dtype=torch.uint8)
    for index in range(6):
        mix_6B = mixing.draw(0, index, B, WHOLE, SIZE)
        mixed, mixed_with = mixing(mix_6B, views, labels_B)
        for view, wanted in zip(views, mixed, strict=True):
            alone, alone_with = mixing(mix_6B, view, labels_B)
            assert torch.equal(alone, wanted)
            assert all(map(torch.equal, alone_with, mixed_with))


def test_images_that_are_not_mixed_stay_as_they_are() -> None:
    """By ``prob`` and from the epoch on that ends mixing; their first label has all of the share."""
    images, labels_B = batch(dtype=torch.uint8)
    for mixing, epoch in ((Mixing(0.8, 1.0, prob=0.0), 0), (Mixing(0.8, 1.0, epochs=2), 2)):
        for index in range(10):
            mix_6B = mixing.draw(epoch, index, B, WHOLE, SIZE)
            mixed, (_, share2_B) = mixing(mix_6B, images, labels_B)
            assert torch.equal(mixed, images)
            assert not share2_B.any()
    assert Mixing(0.8, epochs=2).draw(1, 0, B, WHOLE, SIZE)[0].all()


def test_a_draw_is_a_function_of_seed_epoch_and_batch() -> None:
    mixing = Mixing(0.8, 1.0, each=True, seed=4)
    one = mixing.draw(2, 3, B, WHOLE, SIZE)
    assert torch.equal(one, mixing.draw(2, 3, B, WHOLE, SIZE))
    for other in (
        mixing.draw(3, 3, B, WHOLE, SIZE),
        mixing.draw(2, 4, B, WHOLE, SIZE),
        Mixing(0.8, 1.0, each=True, seed=5).draw(2, 3, B, WHOLE, SIZE),
    ):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_draws_have_their_distribution(mixup: float, cutmix: float, each: bool) -> None:
    """lambda by Kolmogorov and Smirnov's test; how often by two; centres on all of the image."""
    mixing = Mixing(mixup, cutmix, prob=0.7, switch_prob=0.4, each=each)
    N = 4000
    # A box's size tells lambda to 1e-3, unless the border cuts it.
    size, batches, count = (1000, 1000), 1 if each else N, N if each else 2
    draws = [mixing.draw(0, index, count, slice(0, count), size) for index in range(batches)]
    columns_6N = torch.cat(draws, dim=1)[:, :: 1 if each else 2].numpy()
    weight_N, top_N, bottom_N, left_N, right_N, _ = columns_6N
    cut_N, mixed_N = bottom_N > top_N, weight_N > 0
    assert not (cut_N & mixed_N).any()
    both = mixup > 0 and cutmix > 0
    rates = {True: 0.7 * (0.4 if both else cutmix > 0), False: 0.7 * (0.6 if both else mixup > 0)}
    for kind, count in ((True, cut_N.sum()), (False, mixed_N.sum())):
        # CutMix's smallest boxes are empty.
        assert abs(count / N - rates[kind]) < 0.03
    if mixup:
        assert stats.kstest(weight_N[mixed_N], stats.beta(mixup, mixup).cdf).pvalue > 1e-3
    if cutmix:
        inside = cut_N & (top_N > 0) & (left_N > 0) & (bottom_N < 1000) & (right_N < 1000)
        height_N, width_N = bottom_N - top_N, right_N - left_N
        assert (height_N == width_N)[inside].all()
        # Uniform shares s of boxes of which no row is cut off: those have the density 3 (1 - sqrt(s)).
        s = (height_N[cut_N & (top_N > 0) & (bottom_N < 1000)] / 1000) ** 2
        assert stats.kstest(s, lambda s: 3 * s - 2 * s**1.5).pvalue > 1e-3


def test_ranks_draw_as_one_process() -> None:
    """Partners too, where every slice has an even length; else the last image of a slice stays alone."""
    mixing = Mixing(0.8, 1.0, each=True)
    whole_6B = mixing.draw(1, 2, 12, slice(0, 12), SIZE)
    for ranks in (2, 3):
        length = 12 // ranks
        for rank in range(ranks):
            mine = slice(rank * length, (rank + 1) * length)
            mine_6B = mixing.draw(1, 2, 12, mine, SIZE)
            assert torch.equal(mine_6B[:5], whole_6B[:5, mine])
            assert torch.equal(mine_6B[5], whole_6B[5, mine] - mine.start)
    assert mixing.draw(0, 0, 9, slice(3, 6), SIZE)[5].tolist() == [1, 0, 2]
    images, labels_B = batch(dtype=torch.uint8)
    alone_6B = mixing.draw(0, 0, 5, slice(0, 5), SIZE)
    mixed, (labels2_B, _) = mixing(alone_6B, images[:5], labels_B[:5])
    assert torch.equal(mixed[4], images[4])
    assert labels2_B[4] == labels_B[4]


def test_the_dominant_label_has_the_larger_share() -> None:
    labels_B, labels2_B = torch.tensor([1, 1, 1, 1]), torch.tensor([2, 2, 2, 2])
    share2_B = torch.tensor([0.0, 0.4, 0.6, 1.0])
    assert dominant(labels_B, (labels2_B, share2_B)).tolist() == [1, 1, 2, 2]
