"""timm's RandAugment (``rand-...-inc1``): operations, values and draws beside timm's own functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timms

from fastokd.data import Augment
from fastokd.data.augment import draw_rows, operate
from fastokd.data.augment.rows import Uniform, columns, draw_stages
from fastokd.data.augment.spaces import (
    GEOMETRIC,
    NUMBER,
    SIGNED,
    TIMM_SPACE,
    negated,
    timm_values,
)
from fastokd.seeds import keyed_generator
from tests.data.test_operations import pictures

THEIRS = dict(zip(TIMM_SPACE, timms._RAND_INCREASING_TRANSFORMS, strict=True))
ONE = Augment(auto_augment="timm_randaugment", randaugment_ops=1, fill=(124, 116, 104))
SIZES = [(32, 32), (21, 34), (3, 2)]
STRENGTHS = np.array([0, 0.1, 2.5, 4.99, 5, 6.3, 7, 7.5, 9.999, 10])


def timms_argument(name: str, value: float, size: tuple[int, int]) -> tuple[Any, ...]:
    """A value as timm's functions take it: no value, a whole number, or a share of the image's side."""
    if timms.LEVEL_TO_ARG[THEIRS[name]] is None:
        return ()
    if name.startswith("translate"):
        return (-value / size[name == "translate_x"],)
    return (int(value),) if name in ("posterize", "solarize", "solarize_add") else (value,)


def rounded(arguments: tuple[Any, ...]) -> tuple[float, ...]:
    return tuple(round(float(one), 9) for one in arguments)


@pytest.mark.parametrize("size", SIZES)
def test_values_are_timms(size: tuple[int, int]) -> None:
    """In both directions."""
    for name, theirs in THEIRS.items():
        plain = theirs.removesuffix("Increasing").removesuffix("Rel").lower()
        assert plain == name.replace("_", "")
        function = timms.LEVEL_TO_ARG[theirs] or (lambda *_: ())
        for strength, value in zip(STRENGTHS, timm_values(name, STRENGTHS, size), strict=True):
            wanted = {rounded(function(strength, {})) for _ in range(40)}
            both = (value, negated(name, value)) if name in SIGNED else (value,)
            found = {rounded(timms_argument(name, float(one), size)) for one in both}
            assert found == wanted, name


@pytest.mark.parametrize("size", SIZES)
def test_operations_are_timms(size: tuple[int, int]) -> None:
    """To a grey level, from the same images; both ways to run them agree."""
    names = [name for name in TIMM_SPACE for _ in range(20)]
    op_B, value_B = np.array([NUMBER[name] for name in names]), np.empty(len(names))
    for b, name in enumerate(names):
        value = timm_values(name, np.array([b % 20 / 2]), size)
        value_B[b] = (negated(name, value) if name in SIGNED and b % 3 == 0 else value)[0]
    images_BHWC = pictures(len(names), *size)
    columns_BL = torch.from_numpy(columns(op_B, value_B, size, whole=False).astype(np.float32))
    ours_BHWC = operate(ONE, images_BHWC, columns_BL, together=True)
    assert torch.equal(operate(ONE, images_BHWC, columns_BL, together=False), ours_BHWC)
    options = {"fillcolor": ONE.fill, "resample": Image.Resampling.BILINEAR}
    exact = 0.0
    for b, name in enumerate(names):
        arguments = timms_argument(name, value_B[b], size)
        image = Image.fromarray(images_BHWC[b].numpy())
        theirs_HWC = np.asarray(timms.NAME_TO_OP[THEIRS[name]](image, *arguments, **options))
        apart_HWC = np.abs(ours_BHWC[b].numpy().astype(int) - theirs_HWC.astype(int))
        moved = b % 20 > 0 or name not in GEOMETRIC
        assert apart_HWC.max() <= int(moved), (name, value_B[b])
        exact += (apart_HWC == 0).mean() / len(names)
    assert exact > 0.98


def test_draws_are_timms() -> None:
    """Each operation with probability 1/30, at a normal strength within 0 and 10, in either direction."""
    count, size = 60_000, (32, 32)
    augment = replace(ONE, randaugment_ops=2, randaugment_magnitude=9, randaugment_std=1.5)
    stages = draw_stages(augment, count, size, Uniform(keyed_generator("many")))
    assert len(stages) == len(augment.stages) == 2
    for op_B, value_B in stages:
        assert abs((op_B == 0).mean() - 0.5) < 0.01
        for name in TIMM_SPACE:
            assert abs((op_B == NUMBER[name]).mean() - 1 / 30) < 0.004, name
        degrees = value_B[op_B == NUMBER["rotate"]]
        assert abs((degrees < 0).mean() - 0.5) < 0.05
        strength = abs(degrees) / 3
        assert strength.max() == 10
        # Of a normal deviate, 25% are more than 2/3 of a deviation above the mean.
        assert abs((strength == 10).mean() - 0.2525) < 0.04
        assert abs(np.median(strength) - 9) < 0.1
        assert abs(np.quantile(strength, 0.1587) - 7.5) < 0.15
    assert abs(np.corrcoef(stages[0][0], stages[1][0])[0, 1]) < 0.03
    rows_BL = draw_rows(ONE, 50, size, keyed_generator("rows"))
    images_BHWC = pictures(50, *size)
    changed_B = (operate(ONE, images_BHWC, rows_BL) != images_BHWC).flatten(1).any(1)
    assert not changed_B[rows_BL[:, 0] == 0].any()
    translated = np.isin(rows_BL[:, 0], [NUMBER["translate_x"], NUMBER["translate_y"]])
    assert (rows_BL[translated][:, [6, 9]] % 1).any()
