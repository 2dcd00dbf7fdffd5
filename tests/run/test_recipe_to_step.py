"""What a recipe and a method ask for is what a session's steps do."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fastokd.learner.build import build_optimizers
from fastokd.methods import OptimGroup, create_method
from fastokd.methods.okddip import OKDDip
from fastokd.ops import cpp
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from tests.learner.test_step import doubled, session_of, small


def trunk_gradient(name: str) -> tuple[Tensor, Tensor]:
    """The trunk's gradient in the first step of a session, and where nothing divides it."""
    session = doubled(session_of(small(f"{name}/resnet8/digits", students=3)))
    session.begin_epoch()
    images, labels_B = session.stream.batch(0, 0)
    session.begin_step(len(labels_B))
    trunk = session.learner.cohort.trunk
    assert trunk is not None
    found = []
    for scale in (session.learner.cohort.trunk_grad_scale, 1.0):
        session.learner.cohort.trunk_grad_scale = scale
        loss = session.learner.method(
            session.learner.cohort(images), labels_B, session.learner.progress
        )
        gradients = torch.autograd.grad(loss.total, list(trunk.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return found[0], found[1]


@pytest.mark.parametrize(("name", "share"), [("cl_ilr", 1 / 3), ("okddip-branch", 1.0)])
def test_cl_ilrs_branches_share_the_trunks_gradient(name: str, share: float) -> None:
    built, plain = trunk_gradient(name)
    torch.testing.assert_close(built, share * plain, rtol=1e-9, atol=1e-15)


# FFSD counts its five epochs from 1, OKDDip its ramp from 0.
@pytest.mark.parametrize(
    ("name", "epoch", "ramp"),
    [
        ("ffsd", 0, math.exp(-5 * (1 - 1 / 5) ** 2)),
        ("ffsd", 3, math.exp(-5 * (1 - 4 / 5) ** 2)),
        ("ffsd", 4, 1.0),
        ("ffsd", 5, 1.0),
        ("okddip-branch", 0, math.exp(-5)),
        ("okddip-branch", 40, math.exp(-5 * (1 - 40 / 80) ** 2)),
        ("dml", 0, 1.0),
    ],
)
def test_the_ramp_is_the_recipes(name: str, epoch: int, ramp: float) -> None:
    session = session_of(recipe(f"{name}/resnet8/digits", students=3, batch_size=8, epochs=300))
    session.epoch = epoch
    session.begin_epoch()
    assert session.learner.progress.ramp.item() == pytest.approx(ramp, rel=1e-6)


def test_draws_are_of_the_step() -> None:
    """The first batch of a later epoch has draws of its own, the same whenever it is reached."""
    session = session_of(small("okddip_random-branch/resnet8/digits", students=3))

    def drawn(step: int, batch: int, seed: int = 0) -> Tensor:
        session.step, session.batch = step, batch
        session.recipe = small("okddip_random-branch/resnet8/digits", students=3, seed=seed)
        session.begin_step(8)
        return session.learner.progress.draws["belief_BPP"].clone()

    assert not torch.equal(drawn(0, 0), drawn(100, 0))
    assert not torch.equal(drawn(0, 0), drawn(0, 0, seed=1))
    assert torch.equal(drawn(100, 0), drawn(100, 7))


class Undecayed(OKDDip):
    """Projections that neither decay nor move."""

    def optim_groups(self) -> Iterable[OptimGroup]:
        return [OptimGroup(list(self.parameters()), weight_decay=0.0, lr=0.0)]


def test_a_groups_zeros_are_its_own() -> None:
    """They stand for no decay and no rate; only None stands for the recipe's."""
    session = session_of(small(weight_decay=5e-4))
    method = Undecayed(session.learner.cohort.shape)
    plain = create_method("okddip", session.learner.cohort.shape)
    for one, decay, rate in ((method, 0.0, 0.0), (plain, 5e-4, 0.1)):
        (optimizer,) = build_optimizers(
            session.learner.cohort, one, session.recipe, session.learner.device
        )
        students, own = optimizer.param_groups
        assert students["weight_decay"] == 5e-4
        assert own["weight_decay"] == decay
        assert float(own["lr"]) == pytest.approx(rate)
        assert own["initial_lr"] == pytest.approx(rate)


def test_a_run_says_that_it_builds_the_ops_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes minutes; nothing is said where the library is there, or nobody asked."""
    ready = cpp.load()
    for missing in (ready, "the C++ ops are not built"):
        monkeypatch.setattr(cpp, "load", lambda missing=missing: missing)
        monkeypatch.setattr(cpp, "ensure_built", lambda: None)
        monkeypatch.setattr(cpp, "find_compiler", lambda: "/usr/bin/c++")
        for quiet in (False, True):
            one = recipe("dml/resnet8/digits", batch_size=8)
            build(one, RunOptions(device="cpu", impl="auto", quiet=quiet))
            said = capsys.readouterr().out
            assert ("building the C++ ops, once on this machine" in said) == (
                missing is not None and not quiet
            )
