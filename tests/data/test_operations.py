"""Augmentation's batched operations and their draws, beside torchvision's of the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy
from torchvision.transforms.v2 import functional as TF

from fastokd.data import Augment
from fastokd.data.augment import draw_rows, operate
from fastokd.data.augment.rows import Uniform, columns, draw_stages
from fastokd.data.augment.spaces import (
    BINS,
    GEOMETRIC,
    NUMBER,
    POLICIES,
    POLICY_BINS,
    SIGNED,
    SPACE,
    USUAL,
    WIDE,
    values,
)
from fastokd.seeds import keyed_generator
from tests.learner.fake_cuda import CUDA, Dispatched
from tests.learner.test_sync_free import WAITS

NAMES = {number: name for name, number in NUMBER.items()}
THEIRS = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
    "invert": "Invert",
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"auto_augment": "randaugment", "randaugment_ops": 3, "randaugment_magnitude": 17},
    {"auto_augment": "trivialaugment"},
    {"auto_augment": "cifar10"},
    {"auto_augment": "imagenet"},
    {"auto_augment": "svhn"},
    {"vertical_flip": True, "color_jitter": (0.4, 0.5, 1.3, 0.2)},
    {"color_jitter": (0.0, 0.0, 0.0, 0.5), "auto_augment": "cifar10"},
]
SIZES = [(32, 32), (21, 34)]
POLICY_NAMES = {
    "cifar10": AutoAugmentPolicy.CIFAR10,
    "imagenet": AutoAugmentPolicy.IMAGENET,
    "svhn": AutoAugmentPolicy.SVHN,
}


def pictures(B: int, H: int, W: int) -> Tensor:
    """Smooth images with a little noise, some flat, one of few levels: uint8 ``[B, H, W, 3]``."""
    generator = keyed_generator("pictures", B, H, W)
    coarse_B3HW = torch.rand(B, 3, 4, 4, generator=generator) * 300 - 20
    smooth_B3HW = F.interpolate(coarse_B3HW, size=(H, W), mode="bicubic")
    noise_B3HW = 3 * torch.randn(B, 3, H, W, generator=generator)
    images_B3HW = (smooth_B3HW + noise_B3HW).clamp(0, 255).to(torch.uint8)
    images_B3HW[::17] = images_B3HW[::17, :, :1, :1]
    images_B3HW[5::17] &= 128
    images_B3HW[9::17, 1:] = images_B3HW[9::17, :1]  # grey
    return images_B3HW.permute(0, 2, 3, 1).contiguous()


def torchvisions(name: str, image_CHW: Tensor, value: float) -> Tensor:
    """One operation of torchvision on one image."""
    if name == "hue":
        return TF.adjust_hue(image_CHW, value)
    if name == "vertical_flip":
        return TF.vertical_flip(image_CHW)
    if name in ("brightness", "color", "contrast", "sharpness"):
        value -= 1
    if name == "solarize":
        value /= 255
    nearest = InterpolationMode.NEAREST
    own: Tensor = v2.RandAugment()._apply_image_or_video_transform(
        image_CHW, THEIRS[name], value, nearest, {}
    )
    return own


def halfway(op_B: np.ndarray, value_B: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The pixels whose source lies halfway between two, or on the border: either may be taken."""
    H, W = size
    matrix_B6 = torch.from_numpy(columns(op_B, value_B, size)[:, 4:])
    x_W = torch.arange(W) - (W - 1) / 2
    y_H1 = torch.arange(H)[:, None] - (H - 1) / 2
    xx, xy, x0, yx, yy, y0 = matrix_B6[:, :, None, None].unbind(1)
    column_BHW, row_BHW = xx * x_W + xy * y_H1 + x0 + W / 2, yx * x_W + yy * y_H1 + y0 + H / 2
    near = [(at - at.round()).abs() < 1e-4 for at in (column_BHW, row_BHW)]
    changed_B11 = torch.from_numpy(np.isin(op_B, [NUMBER[name] for name in GEOMETRIC]))[
        :, None, None
    ]
    found: Tensor = (near[0] | near[1]) & changed_B11
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_torchvisions_of_the_same_draws(kind: dict[str, Any], size: tuple[int, int]) -> None:
    """To a grey level after each stage, from the same images; both ways to run them agree."""
    B, augment = 200, Augment(**kind)
    rows_BL = draw_rows(augment, B, size, keyed_generator("draws"))
    stages = draw_stages(augment, B, size, Uniform(keyed_generator("draws")))
    images_BHWC, at, exact = pictures(B, *size), 0, 0
    for (op_B, value_B), names in zip(stages, augment.stages, strict=True):
        alone = _OneStage(names)
        columns_BL = rows_BL[:, at : at + 10]
        ours_BHWC = operate(alone, images_BHWC, columns_BL, together=True)
        assert torch.equal(operate(alone, images_BHWC, columns_BL, together=False), ours_BHWC)
        assert {NAMES[int(op)] for op in op_B} <= names | {"identity"}
        theirs_BHWC = torch.stack(
            [
                torchvisions(NAMES[int(op)], image.permute(2, 0, 1), float(value)).permute(1, 2, 0)
                for op, value, image in zip(op_B, value_B, images_BHWC, strict=True)
            ]
        )
        apart_BHWC = (ours_BHWC.int() - theirs_BHWC.int()).abs()
        apart_BHWC[halfway(op_B, value_B, size)] = 0
        assert apart_BHWC.max() <= 1
        exact += int((apart_BHWC == 0).sum())
        assert not torch.equal(ours_BHWC, images_BHWC)
        images_BHWC, at = ours_BHWC, at + 10
    assert exact > 0.999 * images_BHWC.numel() * len(stages)
    assert torch.equal(operate(augment, pictures(B, *size), rows_BL), images_BHWC)


class _OneStage(Augment):
    """An augmentation of one given stage."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        object.__setattr__(self, "names", names)

    @property
    def stages(self) -> tuple[frozenset[str], ...]:
        return (self.names,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
def test_tiny_images_are_torchvisions_too(size: tuple[int, int]) -> None:
    images_BHWC = pictures(40, *size)
    for name in SPACE:
        op_B = np.full(40, NUMBER[name])
        value_B = values(name, USUAL, BINS, size)[np.arange(40) % BINS]
        columns_BL = torch.from_numpy(columns(op_B, value_B, size).astype(np.float32))
        ours = operate(_OneStage(frozenset([name])), images_BHWC, columns_BL)
        for b in range(40):
            theirs = torchvisions(name, images_BHWC[b].permute(2, 0, 1), float(value_B[b]))
            apart = (ours[b].permute(2, 0, 1).int() - theirs.int()).abs()
            apart[:, halfway(op_B, value_B, size)[b]] = 0
            assert apart.max() <= 1, name


@pytest.mark.parametrize("size", SIZES)
def test_the_strengths_are_torchvisions(size: tuple[int, int]) -> None:
    kinds = ((v2.RandAugment, USUAL, BINS), (v2.TrivialAugmentWide, WIDE, BINS))
    for theirs, reach, bins in (*kinds, (v2.AutoAugment, USUAL, POLICY_BINS)):
        space = theirs._AUGMENTATION_SPACE
        ours = SPACE if "Identity" in space else (*SPACE[1:], "invert")
        assert [THEIRS[name] for name in ours] == list(space)
        for name in ours:
            function, signed = space[THEIRS[name]]
            assert signed == (name in SIGNED)
            expected = function(bins, *size)
            if expected is None:
                continue
            found = values(name, reach, bins, size)
            if name in ("brightness", "color", "contrast", "sharpness"):
                found = found - 1
            if name == "solarize":
                found = found / 255
            np.testing.assert_allclose(found, expected.double().numpy(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policies_are_torchvisions(policy: str) -> None:
    theirs = v2.AutoAugment()._get_policies(POLICY_NAMES[policy])
    ours = [
        tuple((THEIRS[part.name], part.probability, part.strength) for part in parts)
        for parts in POLICIES[policy]
    ]
    assert ours == [tuple((name, p, at or 0) for name, p, at in parts) for parts in theirs]


def drawn(augment: Augment, count: int = 20_000) -> list[tuple[np.ndarray, np.ndarray]]:
    return draw_stages(augment, count, (32, 32), Uniform(keyed_generator("many")))


def test_operations_strengths_and_directions_are_uniform() -> None:
    stages = drawn(Augment(auto_augment="randaugment", randaugment_magnitude=30))
    (wide,) = drawn(Augment(auto_augment="trivialaugment"))
    for op_B, value_B in [*stages, wide]:
        for name in SPACE:
            share = (op_B == NUMBER[name]).mean()
            assert abs(share - 1 / 14) < 0.01
            value = value_B[op_B == NUMBER[name]]
            if name in SIGNED:
                middle = 1.0 if name in ("brightness", "color", "contrast", "sharpness") else 0.0
                assert abs((value > middle).mean() - 0.5) < 0.06
    rotated = abs(wide[1][wide[0] == NUMBER["rotate"]])
    counts = np.unique(rotated.round(3), return_counts=True)[1]
    assert len(counts) == BINS
    # 46 expected, 7 its deviation.
    assert counts.min() > 18
    assert counts.max() < 75
    assert np.corrcoef(stages[0][0], stages[1][0])[0, 1] < 0.03


def test_a_policys_operations_come_with_their_probabilities() -> None:
    for policy, table in POLICIES.items():
        stages = drawn(Augment(auto_augment=policy))
        for k, (op_B, _) in enumerate(stages):
            expected: dict[str, float] = {}
            for parts in table:
                name, probability, _ = parts[k]
                expected[name] = expected.get(name, 0.0) + probability / len(table)
            for name, share in expected.items():
                assert abs((op_B == NUMBER[name]).mean() - share) < 0.012


def test_jitters_are_distributed_as_torchvisions() -> None:
    """Each operation once an image, in every order, with torchvision's range of factors."""
    amounts = (0.4, 1.5, 0.2, 0.1)
    stages = drawn(Augment(color_jitter=amounts), 4000)
    order_KB = np.stack([op_B for op_B, _ in stages])
    orders, counts = np.unique(order_KB, axis=1, return_counts=True)
    assert orders.shape == (4, 24)
    assert counts.min() > 100
    jitter = v2.ColorJitter(*amounts)
    theirs = [jitter.make_params([]) for _ in range(2000)]
    names = ("brightness", "contrast", "color", "hue")
    for name, key in zip(names, ("brightness", "contrast", "saturation", "hue"), strict=True):
        ours = np.concatenate([v[op == NUMBER[name]] for op, v in stages])
        assert len(ours) == 4000
        assert ks_2samp(ours, [one[f"{key}_factor"] for one in theirs]).pvalue > 1e-4


def boxes(augment: Augment, count: int, size: tuple[int, int]) -> np.ndarray:
    """Top, left, height and width."""
    found = draw_rows(augment, count, size, keyed_generator("boxes", *size)).numpy()[:, :4]
    return np.concatenate((found[:, :2], found[:, 2:] - found[:, :2]), 1)


@pytest.mark.parametrize("scale", [(0.02, 0.33), (0.5, 1.0)])
def test_erased_boxes_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    """With a scale of which most boxes don't fit, too: a few images then stay as they are."""
    size, count = (40, 24), 4000
    augment = Augment(random_erasing=1.0, erasing_scale=scale)
    ours = boxes(augment, count, size)
    erasing = v2.RandomErasing(p=1.0, scale=scale)
    theirs = [erasing.make_params([torch.empty(3, *size)]) for _ in range(count)]
    erased = np.array([one["v"] is not None for one in theirs])
    none = ours[:, 2] == 0
    assert abs(none.mean() - (~erased).mean()) < 0.03
    for key, number in (("i", 0), ("j", 1), ("h", 2), ("w", 3)):
        expected = np.array([one[key] for one in theirs])[erased]
        assert ks_2samp(ours[~none, number], expected).pvalue > 1e-4
    some = boxes(Augment(random_erasing=0.3), count, size)
    assert abs((some[:, 2] > 0).mean() - 0.3) < 0.03


def test_a_box_is_filled_with_the_mean() -> None:
    augment = Augment(random_erasing=0.7, cutout=9, fill=(10, 200, 30))
    images_BHWC = pictures(60, 32, 24)
    rows_BL = draw_rows(augment, 60, (32, 24), keyed_generator(0))
    expected_BHWC = images_BHWC.clone()
    for b, row in enumerate(rows_BL.int().tolist()):
        for top, left, bottom, right in (row[:4], row[7:11]):
            expected_BHWC[b, top:bottom, left:right] = torch.tensor([10, 200, 30])
    assert torch.equal(operate(augment, images_BHWC, rows_BL), expected_BHWC)
    assert (rows_BL[:, 2] > rows_BL[:, 0]).float().mean() == pytest.approx(0.7, abs=0.2)


@pytest.mark.parametrize("side", [1, 8, 9])
def test_cutouts_centre_is_uniform_and_its_square_is_cut_at_the_border(side: int) -> None:
    size, count = (16, 20), 30_000
    ours = boxes(Augment(cutout=side), count, size)
    for axis, along in ((0, 16), (1, 20)):
        # What a centre at each pixel would give, each as often.
        start = np.arange(along) - side // 2
        seen = np.minimum(start + side, along) - np.maximum(start, 0)
        found = np.minimum(ours[:, axis] + ours[:, 2 + axis], along) - ours[:, axis]
        for length in np.unique(seen):
            assert abs((found == length).mean() - (seen == length).mean()) < 0.015
    assert len(np.unique(ours[:, :2], axis=0)) == (16 - (side // 2)) * (20 - (side // 2))


@pytest.mark.parametrize("kind", [*KINDS[:6], {"auto_augment": "timm_randaugment"}])
def test_nothing_is_read_back_on_a_gpu(kind: dict[str, Any]) -> None:
    augment = Augment(**kind, random_erasing=0.5, cutout=4)
    length = draw_rows(augment, 1, (32, 32), keyed_generator(0)).shape[1]
    with FakeTensorMode():
        images_BHWC = torch.empty(6, 32, 32, 3, dtype=torch.uint8, device=CUDA)
        rows_BL = torch.empty(6, length, device=CUDA)
        with Dispatched() as seen:
            out_BHWC = operate(augment, images_BHWC, rows_BL)
    assert out_BHWC.shape == images_BHWC.shape
    assert seen.ops.keys().isdisjoint(WAITS)
    assert seen.on_the_host == set()
    assert sum(seen.ops.values()) > 10


def test_draws_are_frozen() -> None:
    """Another draw from the same seed would silently end every run's reproducibility."""
    augment = Augment(
        auto_augment="trivialaugment", color_jitter=(0.4, 0, 0, 0.1), random_erasing=1.0, cutout=4
    )
    rows_BL = draw_rows(augment, 2, (32, 32), keyed_generator(3))
    kept = [0, 1, 10, 11, 20, 21, *range(30, 34), *range(37, 41)]
    assert rows_BL[:, kept].double().mul(100).round().int().tolist() == FROZEN


FROZEN = [
    [200, 43, 1600, -10, 700, 65, 2100, 300, 2600, 1300, 1200, 2800, 1600, 3200],
    [1400, 0, 700, 83, 1600, 3, 1800, 700, 2500, 2000, 1700, 400, 2100, 800],
]
