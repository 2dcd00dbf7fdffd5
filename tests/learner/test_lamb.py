"""LAMB against timm's in float64, the step that isn't taken, and the groups of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.learner.build import build_cohort, build_optimizers
from fastokd.learner.lamb import Lamb
from fastokd.recipe.names import recipe

SHAPES = ((3, 4), (2, 3, 3, 3), (4,), (5,))
CPU = torch.device("cpu")


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def groups(parameters: list[Tensor], lr: Any) -> list[dict[str, Any]]:
    return [
        {"params": parameters[:2], "lr": lr, "weight_decay": 0.02},
        {"params": parameters[2:], "lr": lr, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_it_is_timms(clip: float | None) -> None:
    """Thirty steps of large and small gradients, a zero parameter and a zero gradient among them."""
    here, there = drawn(0), drawn(0)
    for x in (here[1], there[1]):
        x.zero_()
    rate = torch.tensor(0.01, dtype=torch.float64)
    ours = Lamb(groups(here, rate), betas=(0.8, 0.99), max_grad_norm=clip)
    theirs = TimmLamb(groups(there, 0.01), betas=(0.8, 0.99), max_grad_norm=clip)
    for step in range(30):
        gradients = drawn(1 + step, 5.0 if step % 3 else 0.01)
        gradients[0] *= step > 2
        for x, y, gradient in zip(here, there, gradients, strict=True):
            x.grad, y.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
        for x, y in zip(here, there, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_the_flag_changes_no_value(first: bool) -> None:
    """Whatever the gradients are; the next step is as if it hadn't been."""
    plain, flagged = drawn(0), drawn(0)
    kept = [Lamb(groups(x, 0.01)) for x in (plain, flagged)]

    def step(which: int, seed: int, flag: float, bad: float = 1.0) -> None:
        for x, gradient in zip((plain, flagged)[which], drawn(seed), strict=True):
            x.grad = gradient * bad
        kept[which].found_inf = torch.tensor(flag)
        kept[which].step()

    if not first:
        step(0, 1, 0.0)
        step(1, 1, 0.0)
    before = [x.clone() for x in flagged]
    step(1, 2, 1.0, float("nan"))
    assert all(torch.equal(x, y) for x, y in zip(flagged, before, strict=True))
    step(0, 3, 0.0)
    step(1, 3, 0.0)
    assert all(torch.equal(x, y) for x, y in zip(plain, flagged, strict=True))
    states = [[s for state in one.state.values() for s in state.values()] for one in kept]
    assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))


def test_each_unit_is_clipped_alone() -> None:
    """A student's step doesn't depend on the others' gradients."""
    alone, together = drawn(0)[:2], drawn(0)[:2]
    ours = Lamb([{"params": together, "weight_decay": 0.02, "units": [0, 1]}])
    single = [Lamb([{"params": [x], "weight_decay": 0.02}]) for x in alone]
    for seed in (1, 2):
        gradients = drawn(seed, 3.0)
        gradients[1] *= 100
        for x, y, gradient in zip(alone, together, gradients, strict=False):
            x.grad, y.grad = gradient.clone(), gradient.clone()
        ours.step()
        for one in single:
            one.step()
    for x, y in zip(alone, together, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def made(name: str, **changes: Any) -> tuple[Cohort, nn.Module, list[torch.optim.Optimizer]]:
    of = recipe(name, **changes)
    cohort, method = build_cohort(of, 10, image_size=8)
    return cohort, method, build_optimizers(cohort, method, of, CPU)


def settings(optimizers: list[torch.optim.Optimizer]) -> dict[Tensor, tuple[float, float]]:
    """The rate and the decay of every parameter."""
    return {
        p: (group["initial_lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_the_default_is_one_group_for_all_students() -> None:
    cohort, method, (optimizer,) = made("okddip-branch/resnet8/digits")
    students, own = optimizer.param_groups
    assert students["params"] == list(cohort.parameters())
    assert own["params"] == list(method.parameters())


@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_norms_without_decay_and_heads_with_their_rate(sharing: str) -> None:
    name = f"okddip-{sharing}/resnet8/digits"
    cohort, method, optimizers = made(name, decay_norms=False, head_lr=0.01, weight_decay=0.25)
    found = settings(optimizers)
    norms = {p for m in cohort.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    for key, p in cohort.named_parameters():
        decay = 0.0 if p in norms or key.endswith("bias") else 0.25
        assert found.pop(p) == (0.01 if ".fc." in key else 0.1, decay), key
    for p in method.parameters():
        assert found.pop(p) == (0.1, 0.25 if p.dim() > 1 else 0.0)
    assert not found


def test_heads_of_another_librarys_students() -> None:
    cohort, _, optimizers = made(
        "dml-network/torchvision:resnet18/digits", students=2, head_lr=0.01
    )
    found = settings(optimizers)
    for key, p in cohort.named_parameters():
        assert (found[p][0] == 0.01) == (".fc." in key), key


def test_a_methods_own_decay_and_adam_stay() -> None:
    """FFSD's: published with the method."""
    settings_of = {"decay_norms": False, "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05}
    _, method, optimizers = made("ffsd/resnet20/cifar10", image_size=32, **settings_of)
    found = settings(optimizers)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, torch.optim.Adam]
    assert {found[p] for p in method.fusion.parameters()} == {(0.001, 1e-5)}  # type: ignore[union-attr, operator]
    assert {found[p] for p in method.decoders.parameters()} == {(1e-3, 1e-4)}  # type: ignore[union-attr, operator]


def test_units_are_the_students() -> None:
    cohort, method, (optimizer,) = made(
        "okddip-branch/resnet8/digits", optimizer="lamb", students=3
    )
    units = {
        p: unit
        for group in optimizer.param_groups
        for p, unit in zip(group["params"], group["units"], strict=True)
    }
    for s, student in enumerate(cohort.students):
        assert {units[p] for p in student.parameters()} == {s}
    assert cohort.trunk is not None
    assert {units[p] for p in (*cohort.trunk.parameters(), *method.parameters())} == {-1}
