"""The check before a timing: it accepts our step and rejects a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastokd.benchmark import loops
from fastokd.benchmark.equality import step_errors
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

NAMES = (
    "okddip-branch/resnet8/cifar100",
    "okddip-network@2/resnet8/cifar100",
    "ffsd/resnet8/cifar100",
    "okddip_kd-branch/resnet8/cifar100",
    "okddip_random-branch/resnet8/cifar100",
    "dml/resnet8/cifar100",
    "one/resnet8/cifar100",
)


def found(name: str, precision: str, **changes: Any) -> Any:
    settings = {"batch_size": 8, **changes}
    return step_errors(recipe(name, **settings), RunOptions(precision=precision, impl="torch"))


@pytest.fixture(autouse=True)
def _small_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers in place of 110: the check is the same."""
    for module in ("synthetic", "loops"):
        name = "recipe" if module == "synthetic" else "named_recipe"
        monkeypatch.setattr(
            f"fastokd.benchmark.{module}.{name}",
            lambda of: recipe(of.replace("resnet110", "resnet8")),
        )


@pytest.mark.parametrize("name", NAMES)
def test_our_step_is_the_published_one(name: str) -> None:
    assert found(name, "fp32").holds


def test_and_so_it_is_in_bf16() -> None:
    assert found(NAMES[0], "bf16").holds


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_wrong_temperature_is_seen(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = loops.build

    def wrong(*args: Any, **kwargs: Any) -> Session:
        session = build(*args, **kwargs)
        session.learner.method.temperature = 2.0
        return session

    monkeypatch.setattr(loops, "build", wrong)
    assert not found("okddip-branch/resnet8/cifar100", precision).holds


def test_a_wrong_ramp_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loops.OurLoop

    class Wrong(ours):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.session.learner.progress.ramp.fill_(0.8)

    monkeypatch.setattr("fastokd.benchmark.equality.OurLoop", Wrong)
    assert not found("okddip-branch/resnet8/cifar100", "fp32").holds


def test_the_timed_loops_learn(cpp_ops: None) -> None:
    """Both losses fall, so no step without an update is timed."""
    of = recipe("okddip-branch/resnet8/digits", batch_size=8)
    for loop in (
        loops.OurLoop(of, RunOptions()),
        loops.PublishedLoop.drawn(of, RunOptions()),
        loops.PublishedLoop.drawn(of, RunOptions(precision="bf16")),
    ):
        losses = torch.stack([loop.step() for _ in range(6)])
        assert losses[-1] < 0.8 * losses[0]


def test_the_loss_of_a_published_step_is_the_first_networks() -> None:
    loop = loops.PublishedLoop.drawn(recipe("ffsd/resnet8/cifar100", batch_size=4), RunOptions())
    first, *others = [loss.detach() for loss, _ in loop.losses()]
    assert others
    assert all(loss != first for loss in others)
    torch.testing.assert_close(loop.step(), first)
