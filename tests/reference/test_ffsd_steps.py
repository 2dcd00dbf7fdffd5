"""Three training steps of FFSD: the method, the reference loop and the published trainer agree."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.methods import Method, OptimGroup, Progress, create_method, ramp_weight
from fastokd.reference import Lambdas, ReferenceFFSD, ffsd_optimizers, ffsd_step
from tests.cohort.test_okddip_steps import batches
from tests.conftest import fill_value, golden, golden_names, step_variant

STEPS = "steps/ffsd_resnet32_m2"

Data = list[tuple[Tensor, Tensor]]
# A parameter's optimizer state, under the parameter's name.
OptimizerState = dict[str, dict[str, Tensor]]


def published_key(key: str, peers: int) -> tuple[str, str]:
    """One of our keys as (prefix, key) of the published trainer."""
    where, rest = key.split(".", 1)
    if where == "fusion":
        return "fusion.", rest
    if where == "transfusion":
        return "leader.", f"trans_fusion_module.{rest}"
    index, rest = rest.split(".", 1)
    if where == "decoders":
        return ("decoder_leader." if index == "leader" else f"decoder{index}."), rest
    return ("leader." if int(index) == peers else f"student{index}."), rest


@torch.no_grad()
def fill_as_published(state: dict[str, Tensor], peers: int) -> None:
    for name, value in state.items():
        prefix, key = published_key(name, peers)
        if key.endswith("num_batches_tracked"):
            value.zero_()
        else:
            value.copy_(step_variant(key, fill_value(prefix + key, value.shape)))


def optimizers_of(
    groups: Iterable[OptimGroup], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """As a session builds them: one optimizer of each kind, over all networks together."""
    kinds: dict[str, list[dict[str, object]]] = {}
    for group in groups:
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        settings = {"params": group.parameters, "weight_decay": decay, "lr": group.lr or lr}
        kinds.setdefault(group.optimizer or "sgd", []).append(settings)
    assert kinds.keys() == {"sgd", "adam"}
    return [
        torch.optim.SGD(kinds["sgd"], momentum=0.9, nesterov=True),
        torch.optim.Adam(kinds["adam"]),
    ]


def optimizer_state(
    optimizers: list[torch.optim.Optimizer], *modules: torch.nn.Module
) -> OptimizerState:
    names = {p: name for module in modules for name, p in module.named_parameters()}
    return {
        names[parameter]: {k: v for k, v in state.items() if isinstance(v, Tensor)}
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }


def method_run(
    cohort: Cohort, method: Method, data: Data, lr: float, weight_decay: float, ramp: float
) -> tuple[dict[str, Tensor], OptimizerState, list[Tensor]]:
    """The cohort's way: one loss, one backward, one step."""
    groups = [OptimGroup(list(cohort.parameters())), *method.optim_groups()]
    optimizers = optimizers_of(groups, lr, weight_decay)
    progress = Progress(torch.tensor(0), torch.tensor(ramp, dtype=torch.float64))
    totals = []
    for x, y in data:
        loss = method(cohort(x), y, progress)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        totals.append(loss.total.detach())
    state = {**cohort.state_dict(), **method.state_dict()}
    return state, optimizer_state(optimizers, cohort, method), totals


def reference_run(
    model: ReferenceFFSD, data: Data, lr: float, weight_decay: float, ramp: float
) -> tuple[dict[str, Tensor], OptimizerState, list[Tensor]]:
    optimizers = ffsd_optimizers(model, lr, weight_decay)
    lambdas = Lambdas(*(ramp * value for value in Lambdas()))
    totals = []
    for x, y in data:
        losses = ffsd_step(model, optimizers, x, y, lambdas)
        each = [*losses.students, losses.fusion, losses.leader, *losses.decoders.values()]
        totals.append(torch.stack(each).sum().detach())
    return model.state_dict(), optimizer_state(optimizers, model), totals


def test_both_meet_the_published_trainer() -> None:
    """goldens/steps/ffsd_resnet32_m2: the state of every network after three steps."""
    g, names = golden(STEPS), golden_names(STEPS, "names")
    ramp = ramp_weight(int(g["epoch"]), 5)
    ours = torch.tensor([1e-5, 10.0, 1000.0], dtype=torch.float64) * ramp
    torch.testing.assert_close(ours, g["lambdas"], rtol=1e-12, atol=0.0)
    assert (float(g["temperature"]), float(g["fusion_weight_decay"])) == (2.0, 1e-5)
    data = batches(int(g["data_seed"]))
    settings = (float(g["lr"]), float(g["weight_decay"]), ramp)

    cohort = Cohort(("resnet32", 3), 100, sharing="network").double()
    method = create_method("ffsd", cohort.shape).double()
    reference = ReferenceFFSD("resnet32", 100).double()
    for module in (cohort, method, reference):
        fill_as_published(module.state_dict(), peers=2)

    for state, _, _ in (
        method_run(cohort, method, data, *settings),
        reference_run(reference, data, *settings),
    ):
        found = {"".join(published_key(key, peers=2)): value for key, value in state.items()}
        assert {n for n in found if not n.endswith("num_batches_tracked")} == set(names)
        sums = torch.stack([torch.stack([found[n].sum(), found[n].square().sum()]) for n in names])
        torch.testing.assert_close(sums, g["sum_and_sumsq"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("peers", [2, 3])
def test_one_backward_equals_the_published_ones(peers: int) -> None:
    """Same weights, three steps: parameters, running statistics and all optimizer state."""
    cohort = Cohort(("resnet8", peers + 1), 100, sharing="network").double()
    method = create_method("ffsd", cohort.shape).double()
    reference = ReferenceFFSD("resnet8", 100, peers + 1).double()
    reference.load_state_dict({**cohort.state_dict(), **method.state_dict()})
    data = batches(seed=peers)

    ours = method_run(cohort, method, data, 0.05, 1e-4, 0.6)
    theirs = reference_run(reference, data, 0.05, 1e-4, 0.6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-9)
    for ours_by_name, theirs_by_name in zip(ours[:2], theirs[:2], strict=True):
        assert ours_by_name.keys() == theirs_by_name.keys()
        for name, value in ours_by_name.items():
            torch.testing.assert_close(
                value, theirs_by_name[name], rtol=1e-9, atol=1e-9, msg=f"{name} differs"
            )
    decoder = ours[1]["decoders.leader.layer0.convtranpose.weight"]
    assert {"exp_avg", "exp_avg_sq", "step"} == decoder.keys()
