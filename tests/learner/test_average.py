"""Averages of weights beside torch's and timm's, and the statistics of an averaged student's norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from fastokd.cohort import Cohort
from fastokd.distributed.ranks import Ranks
from fastokd.learner.average import Average, Averaging
from fastokd.learner.norms import norms_of, recompute, statistics_of

NOW = torch.zeros(())


def cohort_of(sharing: str = "network") -> Cohort:
    return Cohort(("resnet8", 2), 10, sharing=sharing).double()


@torch.no_grad()
def move(cohort: Cohort, number: int) -> None:
    """Other weights and statistics, as a step leaves them."""
    generator = torch.Generator().manual_seed(number)
    for value in cohort.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
        else:
            value.add_(1)


def torchs_ema(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def torchs_swa(model: nn.Module) -> Any:
    return AveragedModel(model, use_buffers=True)


@pytest.mark.parametrize(
    ("how", "theirs"),
    [
        (Averaging(0.9, warmup=False), torchs_ema),
        (Averaging(None), torchs_swa),
        (Averaging(0.9, warmup=False), lambda model: ModelEmaV3(model, decay=0.9)),
    ],
    ids=["ema", "swa", "timm"],
)
@pytest.mark.parametrize("sharing", ["network", "branch"])
def test_an_average_is_torchs_and_timms(
    how: Averaging, theirs: Callable[[nn.Module], Any], sharing: str
) -> None:
    cohort = cohort_of(sharing)
    average = Average(cohort, (0, 1), how, 1)
    wanted = [theirs(cohort.student(index)) for index in range(2)]
    if isinstance(wanted[0], AveragedModel) and how.decay is not None:
        for index, model in enumerate(
            wanted
        ):  # the first of theirs is a copy, as ours is from the start
            model.update_parameters(cohort.student(index))
    for number in range(5):
        move(cohort, number)
        average.update(NOW)
        for index, model in enumerate(wanted):
            update = getattr(model, "update_parameters", None) or model.update
            update(cohort.student(index))
    assert average.updates == 5
    for index, model in enumerate(wanted):
        expected = model.module.state_dict()
        assert average.states[index].keys() == expected.keys()
        for key, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(average.states[index][key], value, rtol=0, atol=1e-9)


def test_before_its_start_it_is_a_copy_and_then_has_every_third_step() -> None:
    """With a warm-up that begins at the start, as torchvision's with its rate's."""
    cohort = cohort_of()
    how = Averaging(0.5, start=1, every=3)
    average = Average(cohort, (1,), how, 1)
    key = "layer1.0.conv1.weight"
    for number in range(2):
        move(cohort, number)
        average.update(torch.tensor(0.0))
    expected = cohort.student_state(1)[key].clone()
    torch.testing.assert_close(average.states[1][key], expected)
    for number in range(7):
        move(cohort, 10 + number)
        average.update(torch.tensor(1.0))
        if number in (2, 5):
            share = max(0.5, 9 / (10 + number // 3))
            expected += share * (cohort.student_state(1)[key] - expected)
        torch.testing.assert_close(average.states[1][key], expected)
    assert average.updates == 2


def test_a_checkpoint_holds_all_that_goes_on() -> None:
    cohort = cohort_of("branch")
    how = Averaging(None, start=0, every=2)
    whole, resumed = (Average(cohort, (0, 1), how, 1) for _ in range(2))
    for number in range(3):
        move(cohort, number)
        whole.update(NOW)
    saved = {name: value.clone() for name, value in whole.entries().items()}
    assert {name.partition(".")[0] for name in saved} == {"ema", "ema0", "ema_updates", "ema_steps"}
    resumed.load(saved)
    for number in range(3):
        move(cohort, 5 + number)
        whole.update(NOW)
        resumed.update(NOW)
    for name, value in whole.entries().items():
        assert torch.equal(value, resumed.entries()[name]), name
    with pytest.raises(KeyError):
        resumed.load({name: value for name, value in saved.items() if "ema0.fc" not in name})


@pytest.mark.parametrize("sharing", ["network", "branch"])
def test_recomputed_statistics_are_those_of_update_bn(sharing: str) -> None:
    """And neither another layer nor the generator notices."""
    cohort = cohort_of(sharing)
    move(cohort, 0)
    images = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(3)]
    theirs = [cohort.student(index).train() for index in range(2)]
    for model in theirs:
        update_bn(images, model)
    cohort.eval()
    momenta = [norm.momentum for norm in norms_of(cohort)]
    drawn = torch.get_rng_state()
    recompute(cohort, images, nullcontext, Ranks())
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(module.training for module in cohort.modules())
    assert [norm.momentum for norm in norms_of(cohort)] == momenta
    for index, model in enumerate(theirs):
        state = cohort.student_state(index)
        for key in statistics_of(cohort, index):
            torch.testing.assert_close(state[key], model.state_dict()[key], rtol=0, atol=1e-9)


def test_statistics_to_be_recomputed_are_the_students_until_then() -> None:
    cohort = cohort_of("branch")
    average = Average(cohort, (1,), Averaging(0.9, statistics=False), 1)
    move(cohort, 0)
    average.update(NOW)
    apart = statistics_of(cohort, 1)
    assert {"bn1.running_mean", "layer3.0.bn1.running_var"} <= apart
    live = cohort.student_state(1)
    copied = {key for key, value in average.states[1].items() if torch.equal(value, live[key])}
    assert copied == apart


def test_norms_of_frozen_stages_keep_their_statistics() -> None:
    cohort = cohort_of()
    move(cohort, 0)
    cohort.freeze(2)
    before = copy.deepcopy(cohort.student_state(0))
    recompute(cohort, [torch.randn(8, 3, 32, 32, dtype=torch.float64)], nullcontext, Ranks())
    after = cohort.student_state(0)
    changed = {key for key in statistics_of(cohort, 0) if not torch.equal(after[key], before[key])}
    assert not any(key.startswith(("bn1.", "layer1.")) for key in changed)
    assert {"layer2.0.bn1.running_mean", "layer3.0.bn2.running_var"} <= changed
