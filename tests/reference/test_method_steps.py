"""Three steps in float64: every method's one summed loss against its plain loop.

The cohort takes one backward and one optimizer step; the loops have the optimizers and backwards
of their publication. Parameters, running statistics and optimizer states must agree to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.methods import Method, Progress, create_method, list_methods, method_class
from fastokd.models import create_model
from fastokd.reference import (
    ReferenceCLILR,
    ReferenceCohort,
    ReferenceDIST,
    ReferenceDKD,
    ReferenceDML,
    ReferenceEntropy,
    ReferenceIndependent,
    ReferenceKD,
    ReferenceKDCL,
    ReferenceMCL,
    ReferenceMean,
    ReferenceNoTwoLevel,
    ReferenceOKDDip,
    ReferenceOKDDipKD,
    ReferenceONE,
    ReferenceRandom,
    ReferenceSymmetric,
)
from fastokd.reference.divergences import correlated, decoupled, standardised_kl

SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
CLASSES, BATCH, SIZE, STEPS = 10, 6, 8, 3
RAMP = 0.6


@dataclass(frozen=True)
class Case:
    """A method with options, its loop, and the loop's attributes that say the same."""

    method: str
    loop: type[ReferenceCohort]
    options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    sharing: tuple[str, ...] = ("branch", "network")
    students: tuple[int, ...] = (2, 3)

    def __str__(self) -> str:
        return "-".join([self.method, *(str(value) for value in self.options.values())])


CASES = [
    Case("baseline", ReferenceIndependent, sharing=("network",), students=(1,)),
    Case("ind", ReferenceIndependent),
    Case("dml", ReferenceDML),
    Case("dml", ReferenceDML, {"mix": "pairwise"}, {"pairwise": True}, students=(3,)),
    Case(
        "dml",
        ReferenceDML,
        {"mix": "pairwise", "detach_targets": True, "temperature": 1.0},
        {"pairwise": True, "detach": True, "temperature": 1.0},
        students=(2, 3),
    ),
    Case("dml", ReferenceDML, {"detach_targets": True}, {"detach": True}, students=(3,)),
    Case("cl_ilr", ReferenceCLILR, sharing=("branch",)),
    Case("one", ReferenceONE, sharing=("branch",)),
    Case("one", ReferenceONE, {"detach_targets": True}, {"detach": True}, sharing=("branch",)),
    Case("okddip", ReferenceOKDDip, students=(2, 3, 4)),
    Case("okddip", ReferenceOKDDip, {"mix": "probs"}, {"mix_probs": True}, students=(3,)),
    Case("okddip", ReferenceOKDDip, {"detach_targets": True}, {"detach": True}, students=(3,)),
    Case("okddip_random", ReferenceRandom),
    Case("okddip_entropy", ReferenceEntropy),
    Case("okddip_mean", ReferenceMean),
    Case("okddip_symmetric", ReferenceSymmetric),
    Case("okddip_no_two_level", ReferenceNoTwoLevel),
    Case("kd", ReferenceKD, students=(1, 2)),
    Case("okddip_kd", ReferenceOKDDipKD),
    Case("dkd", ReferenceDKD, students=(1, 2)),
    Case(
        "dkd",
        ReferenceDKD,
        {"alpha": 0.5, "beta": 2.0, "temperature": 1.0, "warmup": 0.5},
        {"divergence": partial(decoupled, alpha=0.5, beta=2.0), "temperature": 1.0, "warmup": 0.5},
        sharing=("network",),
        students=(2,),
    ),
    Case("dist", ReferenceDIST, students=(1, 2)),
    *(
        Case(method, loop, options, {"divergence": divergence}, sharing=sharing, students=(2,))
        for method, loop, sharing in (
            ("kd", ReferenceKD, ("network",)),
            ("okddip_kd", ReferenceOKDDipKD, ("branch",)),
        )
        for options, divergence in (
            ({"divergence": "dkd"}, decoupled),
            ({"divergence": "dist"}, correlated),
            ({"standardise_logits": True}, standardised_kl),
        )
    ),
    *(
        Case(
            "dml",
            ReferenceDML,
            {**options, **more},
            {"divergence": divergence, "detach": True, "pairwise": "mix" in more},
            sharing=("branch",),
            students=(3,),
        )
        for options, divergence in (
            ({"divergence": "dkd"}, decoupled),
            ({"divergence": "dist"}, correlated),
            ({"standardise_logits": True}, standardised_kl),
        )
        for more in ({}, {"mix": "pairwise"})
    ),
    Case("kdcl", ReferenceKDCL, {"target": "naive"}, {"target": "naive"}),
    # Far from the solution's last digits, where two ways of summing would part.
    Case(
        "kdcl",
        ReferenceKDCL,
        {"target": "linear", "linear_steps": 8},
        {"target": "linear", "linear_steps": 8},
    ),
    Case("kdcl", ReferenceKDCL, {"target": "min_logit"}, {"target": "min_logit"}),
    Case("kdcl", ReferenceKDCL, {"target": "general"}, {"target": "general"}),
    Case("mcl", ReferenceMCL, students=(3,)),
    Case("mcl", ReferenceMCL, {"logit_distill": True}, {"logit_distill": True}, students=(2,)),
    Case(
        "mcl",
        ReferenceMCL,
        {"logit_distill": True, "tau": 0.3, "lam": 0.5},
        {"logit_distill": True, "tau": 0.3, "lam": 0.5},
        sharing=("network",),
        students=(4,),
    ),
]
GRID = [
    pytest.param(case, sharing, students, id=f"{case}-{sharing}-{students}")
    for case in CASES
    for sharing in case.sharing
    for students in case.students
]


def images_and_labels(count: int, views: int | None = None) -> list[tuple[Tensor, Tensor]]:
    first = () if views is None else (views,)
    return [
        (torch.randn(*first, BATCH, 3, SIZE, SIZE).double(), torch.randint(CLASSES, (BATCH,)))
        for _ in range(count)
    ]


def optimizer_state(
    optimizers: list[torch.optim.Optimizer], modules: list[nn.Module]
) -> dict[str, Tensor]:
    names = {p: name for module in modules for name, p in module.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def compare(
    cohort: Cohort,
    method: Method,
    loop: ReferenceCohort,
    each_step: Callable[[int], None],
    views: int | None = None,
) -> None:
    """Trains both from the loop's weights and compares all that they hold."""
    ours, theirs = {**cohort.state_dict(), **method.state_dict()}, loop.state_dict()
    ours.pop("weights_S", None)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for key, value in theirs.items():
            ours[key].copy_(value)
    optimizer = torch.optim.SGD([*cohort.parameters(), *method.parameters()], **SGD)
    optimizers = loop.optimizers(**SGD)
    progress = Progress(torch.zeros(()), torch.tensor(RAMP).double())

    for step, (x, y) in enumerate(images_and_labels(STEPS, views)):
        each_step(step)
        draws = method.draw(BATCH, torch.Generator().manual_seed(step))
        progress.draws = {name: value.double() for name, value in draws.items()}
        for name, value in progress.draws.items():
            setattr(loop, name, value)
        loss = method(cohort(x), y, progress)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses = loop.step(optimizers, x, y, progress.ramp.item())
        torch.testing.assert_close(loss.total, losses.total, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss.parts["ce_S"], torch.stack(losses.ce).detach())
        if losses.kd:
            torch.testing.assert_close(loss.parts["kd_S"], torch.stack(losses.kd).detach())

    ours = {**cohort.state_dict(), **method.state_dict()}
    for key, value in loop.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)
    momenta = optimizer_state([optimizer], [cohort, method])
    expected = optimizer_state(optimizers, [loop])
    assert momenta.keys() == expected.keys()
    assert momenta
    for key, value in expected.items():
        torch.testing.assert_close(momenta[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize(("case", "sharing", "students"), GRID)
def test_one_backward_is_the_loop(case: Case, sharing: str, students: int) -> None:
    assert_same_steps(case, sharing, students)


# One case of each method and sharing; the other engines give the methods nothing else
# (tests/cohort/test_view_engines.py), so a few stand for all.
VIEWED = [
    pytest.param(case, sharing, case.students[-1], engine, id=f"{case}-{sharing}-{engine}")
    for case in {case.method: case for case in CASES}.values()
    for sharing in case.sharing
    for engine in ("loop", "grouped", "vmap")
    if engine == "loop" or case.method in ("okddip", "one", "kd")
]


@pytest.mark.parametrize(("case", "sharing", "students", "engine"), VIEWED)
def test_a_view_each_is_the_loop(case: Case, sharing: str, students: int, engine: str) -> None:
    assert_same_steps(case, sharing, students, engine, views=True)


def assert_same_steps(
    case: Case, sharing: str, students: int, engine: str = "loop", *, views: bool = False
) -> None:
    """``views``: each student has images of its own, and so has a teacher."""
    taught = method_class(case.method).needs.teacher
    teacher = create_model("resnet8", CLASSES).double() if taught else None
    loop = case.loop("resnet8", CLASSES, students, sharing).double()
    for name, value in case.attributes.items():
        setattr(loop, name, value)
    if teacher is not None:
        assert isinstance(loop, (ReferenceKD, ReferenceOKDDipKD))
        loop.set_teacher(teacher)
    divided = case.method == "cl_ilr"
    cohort = Cohort(
        ("resnet8", students),
        CLASSES,
        sharing=sharing,
        teacher=teacher,
        trunk_grad_scale=1 / students if divided else 1.0,
    ).double()
    cohort.set_engine(engine)
    method = create_method(case.method, cohort.shape, **case.options).double()
    assert method.needs.divide_trunk_gradient == divided

    def each_step(step: int) -> None:
        if case.options.get("target") == "general" and step:
            assert isinstance(loop, ReferenceKDCL)
            heldout = images_and_labels(1)[0]
            method.end_epoch(cohort, heldout)
            loop.weigh(*heldout)

    compare(cohort, method, loop, each_step, students + (teacher is not None) if views else None)


def test_every_method_has_a_loop() -> None:
    apart = {"ffsd", "okdph", "pcl"}  # test_ffsd_steps.py, test_companion_steps.py
    assert {case.method for case in CASES} | apart == set(list_methods())


@pytest.mark.parametrize(
    "models", [["resnet8", "wrn_16_2", "resnet8"], ["densenet_40_12", "resnet8"]]
)
def test_a_mixed_cohort_is_the_loop(models: list[str]) -> None:
    """Peers of several widths get a pair of projections each; the leader's width is free."""
    loop = ReferenceOKDDip(models, CLASSES, sharing="network").double()
    cohort = Cohort(models, CLASSES, sharing="network").double()
    method = create_method("okddip", cohort.shape).double()
    compare(cohort, method, loop, lambda step: None)


def test_a_mixed_cohort_learns_mutually() -> None:
    models = ["resnet8", "wrn_16_2"]
    loop = ReferenceDML(models, CLASSES, sharing="network").double()
    cohort = Cohort(models, CLASSES, sharing="network").double()
    compare(cohort, create_method("dml", cohort.shape).double(), loop, lambda step: None)
