"""Learning rates against torch's, timm's, torchvision's and FFCV's schedules, to 1e-12."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.optim import lr_scheduler

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.recipe import Recipe

EPOCHS, STEPS = 20, 7
LR, FINAL, FIRST = 0.4, 0.003, 0.02


def small(**changes: Any) -> Recipe:
    return recipe("baseline/resnet8/digits", epochs=EPOCHS, lr=LR, **changes)


def ours(of: Recipe, **how: Any) -> list[float]:
    """The rate of every update: each epoch's, or each step's."""
    steps = STEPS if of.schedule_by == "step" else 1
    return [
        of.learning_rate(epoch, step=step, steps=steps, **how)
        for epoch in range(of.epochs)
        for step in range(steps)
    ]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)


def torchs(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[float]:
    optimizer = sgd()
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def agrees(found: list[float], expected: list[float]) -> bool:
    assert len(found) == len(expected)
    return float(np.abs(np.array(found) - np.array(expected)).max()) < 1e-12


@pytest.mark.parametrize("by", ["epoch", "step"])
class TestAgainstTorch:
    def count(self, by: str) -> tuple[int, int]:
        """The updates of an epoch and of a run."""
        each = STEPS if by == "step" else 1
        return each, each * EPOCHS

    def test_step(self, by: str) -> None:
        each, count = self.count(by)
        of = small(milestones=[8, 15], lr_decay=0.2, schedule_by=by)
        at = [8 * each, 15 * each]
        theirs = torchs(lambda o: lr_scheduler.MultiStepLR(o, at, 0.2), count)
        assert agrees(ours(of), theirs)

    def test_cosine(self, by: str) -> None:
        _, count = self.count(by)
        of = small(schedule="cosine", final_lr=FINAL, schedule_by=by)
        theirs = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, count, FINAL), count)
        assert agrees(ours(of), theirs)

    def test_linear(self, by: str) -> None:
        _, count = self.count(by)
        of = small(schedule="linear", final_lr=FINAL, schedule_by=by)
        theirs = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, FINAL / LR, count), count)
        assert agrees(ours(of), theirs)

    def test_constant(self, by: str) -> None:
        assert ours(small(schedule="constant", schedule_by=by)) == [LR] * self.count(by)[1]

    def test_one_cycle(self, by: str) -> None:
        _, count = self.count(by)
        of = small(
            schedule="one_cycle",
            schedule_by=by,
            warmup="before",
            warmup_epochs=0.3 * EPOCHS,
            warmup_lr=LR / 25,
            final_lr=LR / 25 / 1e4,
        )
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
        cycle = lr_scheduler.OneCycleLR(optimizer, LR, total_steps=count, cycle_momentum=False)
        theirs = []
        for n in range(count):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if n + 1 < count:
                cycle.step()
        assert agrees(ours(of), theirs)

    def test_torchvisions_references(self, by: str) -> None:
        """references/classification/train.py: LinearLR for the warm-up, then CosineAnnealingLR."""
        each, count = self.count(by)
        of = small(
            schedule="cosine",
            schedule_by=by,
            final_lr=FINAL,
            warmup="before",
            warmup_epochs=5.0,
            warmup_lr=0.01 * LR,
        )

        def make(o: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
            up = lr_scheduler.LinearLR(o, 0.01, total_iters=5 * each)
            down = lr_scheduler.CosineAnnealingLR(o, count - 5 * each, FINAL)
            return lr_scheduler.SequentialLR(o, [up, down], [5 * each])

        assert agrees(ours(of), torchs(make, count))

    @pytest.mark.parametrize("warmup", ["over", "before"])
    def test_timms_cosine(self, by: str, warmup: str) -> None:
        """``warmup_prefix`` moves the cosine to behind the warm-up."""
        each, count = self.count(by)
        of = small(
            schedule="cosine",
            schedule_by=by,
            final_lr=FINAL,
            warmup=warmup,
            warmup_epochs=5.0,
            warmup_lr=FIRST,
        )
        before = warmup == "before"
        optimizer = sgd()
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=count - 5 * each if before else count,
            lr_min=FINAL,
            warmup_t=5 * each,
            warmup_lr_init=FIRST,
            warmup_prefix=before,
        )
        theirs = []
        for n in range(count):
            scheduler.step(n)
            theirs.append(optimizer.param_groups[0]["lr"])
        assert agrees(ours(of), theirs)


def test_ffcvs_peak() -> None:
    """rn18_configs: a line up to the peak's epoch and a line down to 0, step by step."""
    of = small(
        schedule="linear",
        schedule_by="step",
        warmup="before",
        warmup_epochs=2.0,
        warmup_lr=1e-4 * LR,
    )
    peak = [[0, 2, EPOCHS], [1e-4 * LR, LR, 0]]
    at = np.interp(np.arange(EPOCHS + 1), *peak)
    theirs = [
        float(np.interp(step, [0, STEPS], [at[epoch], at[epoch + 1]]))
        for epoch in range(EPOCHS)
        for step in range(STEPS)
    ]
    assert agrees(ours(of), theirs)


def test_the_papers_schedule_is_as_it_was() -> None:
    """To the bit: FFSD's milestones and warm-up."""
    of = recipe("ffsd/resnet18/imagenet")
    for epoch in range(90):
        rate = 0.1 * 0.1 ** sum(epoch >= milestone for milestone in (30, 60, 80))
        assert of.learning_rate(epoch, warm_up=False) == rate
        if epoch + 1 < 5:
            rate *= (epoch + 1) / 5
        assert of.learning_rate(epoch) == rate


def test_a_scaled_warm_up_by_step() -> None:
    of = small(schedule="constant", schedule_by="step", warmup_epochs=2.0)
    rates = ours(of)
    assert rates[: 2 * STEPS] == pytest.approx([LR * n / 14 for n in range(1, 15)], abs=1e-15)
    assert set(rates[2 * STEPS :]) == {LR}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle"])
def test_without_the_warm_up_a_schedule_waits_at_its_first_rate(schedule: str) -> None:
    """FFSD's decoders have no warm-up; a schedule after the warm-up begins with the others'."""
    of = small(schedule=schedule, warmup="before", warmup_epochs=5.0, warmup_lr=FIRST)
    warm, cold = ours(of), ours(of, warm_up=False)
    assert cold[:5] == [LR] * 5
    assert cold[5:] == warm[5:]
    over = small(schedule="cosine", warmup="over", warmup_epochs=5.0, warmup_lr=FIRST)
    assert ours(over, warm_up=False) == ours(small(schedule="cosine"))


def test_fewer_epochs_scale_every_part() -> None:
    """At the same fraction of the run, the rate is the same."""
    of = small(
        schedule="cosine",
        schedule_by="step",
        warmup="before",
        warmup_epochs=4.0,
        warmup_lr=FIRST,
        frozen_stages=1,
        frozen_epochs=6,
    )
    one = dataclasses.replace(of, schedule_by="epoch").with_epochs(1)
    assert ours(one) == [LR]  # no warm-up of a fifth of an update
    short = of.with_epochs(EPOCHS // 2)
    assert (short.warmup_epochs, short.frozen_epochs) == (2, 3)
    for epoch in range(short.epochs):
        rate = short.learning_rate(epoch, step=2, steps=STEPS)
        longer = of.learning_rate(2 * epoch, step=4, steps=STEPS)
        assert rate == pytest.approx(longer, abs=1e-15)
    assert of.with_epochs(1).frozen_epochs == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin': choose step, cosine"),
        (
            {"final_lr": 0.1},
            "the schedule step has no final rate: choose cosine, linear or one_cycle, or",
        ),
        ({"schedule": "cosine", "final_lr": 0.5}, "final_lr is 0.5: it must be at most lr"),
        ({"warmup": "over", "warmup_epochs": 1, "warmup_lr": 0.5}, "warmup_lr is 0.5: it must be"),
        ({"warmup_lr": 0.1, "warmup_epochs": 2}, "set warmup to over or before"),
        ({"warmup": "over"}, "warmup_epochs is 0.0: the warm-up 'over' needs a number above 0"),
        ({"warmup": "before", "warmup_epochs": 20}, "above 0 and below epochs, 20"),
        ({"schedule": "one_cycle", "warmup_epochs": 2}, "set warmup to before"),
        ({"schedule": "one_cycle", "warmup": "before"}, "torch's is at 0.3 of them, 6"),
        ({"schedule": "cosine", "milestones": [3]}, r"milestones is \(3,\), which means nothing"),
        ({"schedule": "constant", "lr_decay": 0.5}, "means nothing with the schedule constant"),
        ({"optimizer": "adam"}, "optimizer is 'adam': choose sgd, adamw or lamb"),
        ({"optimizer": "lamb", "momentum": 0.8}, "means nothing with the optimizer lamb"),
        ({"beta1": 0.8}, "beta1 is 0.8, which means nothing with the optimizer sgd"),
        ({"head_lr": -1.0}, "head_lr is -1.0: it must be a finite number, at least 0"),
        ({"frozen_stages": 1}, "frozen_epochs is 0: set it to the number of epochs"),
        ({"frozen_epochs": 1}, "frozen_stages is 0: set it to the number of stages"),
        (
            {"frozen_stages": 1, "frozen_epochs": 21},
            "frozen_epochs is 21: it must be at most epochs",
        ),
        ({"frozen_stages": -2, "frozen_epochs": 1}, "frozen_stages is -2: it must be at least -1"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        small(**changes)
