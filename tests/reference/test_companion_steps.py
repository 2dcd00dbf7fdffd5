"""Three steps in float64 of the methods with a companion, by every engine, against their loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.methods import Method, Progress, create_method
from fastokd.reference import ReferenceCohort, ReferenceOKDPH, ReferencePCL
from tests.reference.test_method_steps import BATCH, CLASSES, RAMP, SGD, STEPS, images_and_labels

OKDPH: list[dict[str, Any]] = [
    {"gap": 2, "gamma": 0.6, "omega": 0.8},
    {"fusion": "epoch", "gap": 1, "omega": 0.3, "beta": 0.7, "gamma": 0.5},
    {"hybrid_gradient": True, "omega": 0.4, "gap": 2},
    {"hybrid": "dirichlet", "hybrid_gradient": True, "omega": 0.4, "gamma": 0.3, "gap": 1},
]


def compared(
    cohort: Cohort, method: Method, loop: ReferenceCohort, views: int, *, epochs: bool = False
) -> None:
    """``epochs``: each step ends an epoch."""
    ours = {**cohort.state_dict(), **method.state_dict()}
    with torch.no_grad():
        for key, value in loop.state_dict().items():
            ours[key].copy_(value)
    trained = [p for p in [*cohort.parameters(), *method.parameters()] if p.requires_grad]
    optimizer, optimizers = torch.optim.SGD(trained, **SGD), loop.optimizers(**SGD)
    progress = Progress.start(ramp=RAMP)
    for step, (x, y) in enumerate(images_and_labels(STEPS, views)):
        progress.draws = method.draw(BATCH, torch.Generator().manual_seed(step))
        shares = getattr(method.companion, "shares", None)
        if shares is not None:
            loop.shares = shares(torch.float64).tolist()
        loss = method(cohort(x), y, progress)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        with torch.no_grad():
            method.after_step(cohort, progress)
        losses = loop.step(optimizers, x, y, RAMP)
        if epochs:
            method.end_epoch(cohort, None)
            loop.end_epoch()
        torch.testing.assert_close(loss.total, losses.total, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss.parts["ce_S"], torch.stack(losses.ce).detach())
        torch.testing.assert_close(loss.parts["kd_S"], torch.stack(losses.kd).detach())
    beside = loop.network if isinstance(loop, ReferenceOKDPH) else loop.mean[0]
    same(cohort.state_dict(), loop.state_dict())
    networks = method.companion.networks
    same(
        networks.student_state(0) if isinstance(loop, ReferenceOKDPH) else networks.state_dict(),
        beside.state_dict(),
    )


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for key, value in theirs.items():
        if key in ours:
            torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert len(ours.keys() & theirs.keys()) > 40


ENGINES = ("loop", "grouped", "vmap")


@pytest.mark.parametrize(("students", "engine"), [(2, "loop"), *((3, name) for name in ENGINES)])
def test_pcl_is_the_loop(students: int, engine: str) -> None:
    loop = ReferencePCL("resnet8", CLASSES, students).double()
    cohort = Cohort(("resnet8", students), CLASSES, engine=engine).double()
    method = create_method("pcl", cohort.shape).double()
    compared(cohort, method, loop, students)


@pytest.mark.parametrize(
    ("options", "engine"),
    [*((OKDPH[0], name) for name in ENGINES), *((one, "loop") for one in OKDPH[1:])],
    ids=str,
)
def test_okdph_is_the_loop(options: dict[str, Any], engine: str) -> None:
    loop = ReferenceOKDPH("resnet8", CLASSES, 2).double()
    for name, value in options.items():
        setattr(loop, name, value)
    cohort = Cohort(("resnet8", 2), CLASSES, sharing="network", engine=engine).double()
    method = create_method("okdph", cohort.shape, **options).double()
    compared(cohort, method, loop, 3, epochs=options.get("fusion") == "epoch")
