"""Three training steps: the cohort, the reference loop and the published trainer agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort
from fastokd.methods import Progress, create_method
from fastokd.reference import ReferenceOKDDip
from tests.conftest import fill_value, golden, golden_names, step_variant


def published_key(key: str) -> str:
    """Our key of a branch ResNet cohort, as the published trainer names it."""
    if key.startswith(("query.", "key.")):
        return key.replace(".", "_weight.", 1)
    where, rest = key.split(".", 1)
    if where == "trunk":
        return rest
    index, rest = rest.split(".", 1)
    name, rest = rest.split(".", 1)
    return f"{'classifier3' if name == 'fc' else name}_{index}.{rest}"


@torch.no_grad()
def fill_as_published(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        name = published_key(key)
        if name.endswith("num_batches_tracked"):
            value.zero_()
        else:
            value.copy_(step_variant(name, fill_value(name, value.shape)))


def batches(seed: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        x = torch.randn(16, 3, 32, 32, generator=generator, dtype=torch.float64)
        drawn.append((x, torch.randint(100, (16,), generator=generator)))
    return drawn


def sgd(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def cohort_run(
    cohort: Cohort,
    method: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    lr: float,
    weight_decay: float,
    kd_weight: float,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    optimizer = sgd([*cohort.parameters(), *method.parameters()], lr, weight_decay)
    progress = Progress.start(ramp=kd_weight)
    rows = []
    for x, y in data:
        loss = method(cohort(x), y, progress)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rows.append(torch.cat([loss.total.detach()[None], loss.parts["ce_S"], loss.parts["kd_S"]]))
    return {**cohort.state_dict(), **method.state_dict()}, rows


def reference_run(
    model: ReferenceOKDDip,
    data: list[tuple[Tensor, Tensor]],
    lr: float,
    weight_decay: float,
    kd_weight: float,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    optimizer = sgd(list(model.parameters()), lr, weight_decay)
    rows = []
    for x, y in data:
        losses = model.step([optimizer], x, y, kd_weight)
        rows.append(torch.stack([losses.total, *losses.ce, *losses.kd]).detach())
    return model.state_dict(), rows


def test_both_meet_the_published_trainer() -> None:
    """goldens/steps/okddip_branch_resnet32_s4: losses of three steps, and the state after."""
    g = golden("steps/okddip_branch_resnet32_s4")
    names = golden_names("steps/okddip_branch_resnet32_s4", "names")
    data = batches(int(g["data_seed"]))
    settings = (float(g["lr"]), float(g["weight_decay"]), float(g["kd_weight"]))

    cohort = Cohort(("resnet32", 4), 100).double()
    method = create_method("okddip", cohort.shape).double()
    reference = ReferenceOKDDip("resnet32", 100).double()
    for module in (cohort, method, reference):
        fill_as_published(module.state_dict())

    for state, rows in (
        cohort_run(cohort, method, data, *settings),
        reference_run(reference, data, *settings),
    ):
        torch.testing.assert_close(torch.stack(rows), g["losses"], rtol=1e-9, atol=1e-9)
        ours = {published_key(key): value for key, value in state.items()}
        assert {n for n in ours if not n.endswith("num_batches_tracked")} == set(names)
        sums = torch.stack([torch.stack([ours[n].sum(), ours[n].square().sum()]) for n in names])
        torch.testing.assert_close(sums, g["sum_and_sumsq"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize("students", [2, 5])
def test_cohort_equals_reference(sharing: str, students: int) -> None:
    """Same weights, three batches, three steps: every parameter and running statistic."""
    cohort = Cohort(("resnet8", students), 100, sharing=sharing).double()
    method = create_method("okddip", cohort.shape).double()
    reference = ReferenceOKDDip("resnet8", 100, students, sharing).double()
    reference.load_state_dict({**cohort.state_dict(), **method.state_dict()})
    data = batches(seed=students)
    ours, our_rows = cohort_run(cohort, method, data, 0.1, 5e-4, 0.6)
    theirs, their_rows = reference_run(reference, data, 0.1, 5e-4, 0.6)
    torch.testing.assert_close(our_rows, their_rows, rtol=1e-9, atol=1e-9)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_the_published_cohort_gives_logits_and_features_of_every_student(sharing: str) -> None:
    reference = ReferenceOKDDip("resnet8", 10, 3, sharing).eval()
    x_BCHW = torch.randn(2, 3, 32, 32)
    logits, features = reference(x_BCHW)
    wanted = reference.outputs(x_BCHW)
    for got, out in ((logits, wanted.logits), (features, wanted.features)):
        assert len(got) == 3
        assert all(torch.equal(x, y) for x, y in zip(got, out, strict=True))
