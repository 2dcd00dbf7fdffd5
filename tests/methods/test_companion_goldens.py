"""PCL's and OKDPH's published code, float64: losses, gradients, whole steps (tests/goldens/README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.known import MODELS
from fastokd.methods import Progress, create_method
from fastokd.methods.okdph import OKDPH
from fastokd.methods.pcl import PCL
from fastokd.models import Student, registry

GOLDENS = Path(__file__).parents[1] / "goldens"


def load(name: str) -> dict[str, Tensor | str]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {
            key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
            for key, value in file.items()
        }


def close(ours: Tensor, golden: object) -> None:
    assert isinstance(golden, Tensor)
    torch.testing.assert_close(ours, golden, rtol=1e-9, atol=1e-12)


class First(nn.Linear):
    """The first entries of an image as a vector; maps of 1x1."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.flatten(1)[:, : self.in_features])[..., None, None]


class Small(Student):
    """The student of the whole steps: linear, BatchNorm, ReLU, linear."""

    def __init__(self, num_classes: int, *, inputs: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.fc1 = First(inputs, hidden)
        self.bn = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_classes)
        self.chain(("fc1", "bn", "relu"), head="fc2", feature_dim=hidden, map_stages=(0,))


@pytest.fixture
def small() -> Iterator[str]:
    registry.register_model("small", Small, input_size=4, about="golden steps")
    yield "small"
    del registry._SPECS["small"], MODELS["small"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_pcl_is_the_published_loss(name: str) -> None:
    g = load(f"pcl_{name}")
    S, _, C = g["logits_SBC"].shape
    D = g["features_SBD"].shape[2]
    shape = CohortShape(S, C, "branch", (D,) * S, 4, ((),) * S)
    method = create_method("pcl", shape, temperature=g["temperature"].item()).double()
    assert isinstance(method, PCL)
    with torch.no_grad():
        method.ensemble.weight.copy_(g["ensemble_weight"])
        method.ensemble.bias.copy_(g["ensemble_bias"])
    logits_SBC = g["logits_SBC"].requires_grad_()
    features_SBD = g["features_SBD"].requires_grad_()
    out = CohortOutput(
        logits_SBC,
        tuple(features_SBD),
        ((),) * S,
        None,
        None,
        companion_logits_EBC=g["mean_logits_SBC"],
    )
    loss = method(out, g["labels_B"], Progress.start(ramp=g["kd_weight"].item()))
    loss.total.backward()
    close(method.ensemble_logits(out).detach(), g["ensemble_logits_BC"])
    close(loss.total.detach(), g["total"])
    close(loss.parts["ce_S"], g["ce_S"])
    close(loss.parts["kd_S"], g["ensemble_kd_S"] + g["mean_kd_S"])
    close(loss.parts["ensemble_ce"], g["ensemble_ce"])
    close(logits_SBC.grad, g["grad_logits"])
    close(features_SBD.grad, g["grad_features"])
    close(method.ensemble.weight.grad, g["grad_ensemble_weight"])
    close(method.ensemble.bias.grad, g["grad_ensemble_bias"])

    faulty = create_method("pcl", shape, ramp="published_code")
    assert isinstance(faulty, PCL)
    progress = Progress.start()
    for epoch, weight in enumerate(g["published_ramp"]):
        progress.epoch.fill_(epoch)
        close(faulty.weight(progress), weight)


@pytest.mark.parametrize("name", ["a", "b"])
def test_pcls_mean_model_is_the_published_one(name: str, small: str) -> None:
    """15 parameters of the classifier follow the golden's; each of its updates is a step."""
    g = load(f"pcl_{name}")
    cohort = Cohort((small, 2), 3, sharing="branch", model_options={"inputs": 2, "hidden": 2})
    method = create_method("pcl", cohort.double().shape).double()
    assert isinstance(method, PCL)
    mean = method.companion
    assert mean is not None
    with torch.no_grad():
        mean.ensemble.weight.view(-1)[:12].copy_(g["ema_first"][:12])
        mean.ensemble.bias.copy_(g["ema_first"][12:])
        for step, student, expected in zip(
            g["ema_global_step"], g["ema_student"], g["ema_mean"], strict=True
        ):
            method.ensemble.weight.view(-1)[:12].copy_(student[:12])
            method.ensemble.bias.copy_(student[12:])
            mean.steps.fill_(step)
            method.after_step(cohort, Progress.start())
            ours = torch.cat([mean.ensemble.weight.view(-1), mean.ensemble.bias])
            close(ours, expected)


@pytest.mark.parametrize("engine", ["loop", "vmap"])  # grouped stacks no layers of a test
@pytest.mark.parametrize("name", ["a", "b"])
def test_okdphs_steps_are_the_published_ones(name: str, engine: str, small: str) -> None:
    g = load(f"okdph_{name}")
    S, _, C = g["logits_SBC"].shape
    H, D = g["init_fc1.weight"].shape[1:]
    cohort = Cohort(
        (small, S),
        C,
        sharing="network",
        engine=engine,
        impl="torch",
        model_options={"inputs": D, "hidden": H},
        image_size=4,
    ).double()
    fusion = g["fusion"] or "none"
    options = {key: g[key].item() for key in ("temperature", "omega", "beta", "gamma", "gap")}
    method = create_method("okdph", cohort.shape, fusion=fusion, **options).double()
    assert isinstance(method, OKDPH)
    for index in range(S):
        for key, value in cohort.student_state(index).items():
            if f"init_{key}" in g:
                value.copy_(g[f"init_{key}"][index])
    optimizer = torch.optim.SGD(
        cohort.parameters(), **{k: g[k].item() for k in ("lr", "momentum", "weight_decay")}
    )
    sums_S = torch.zeros(S).double()
    progress = Progress.start()
    for step, (x_VBD, labels_B) in enumerate(
        zip(g["views_KBVD"].transpose(1, 2), g["labels_KB"], strict=True)
    ):
        images = torch.zeros(S + 1, x_VBD.shape[1], 48).double()
        images[..., :D] = x_VBD
        out = cohort(images.unflatten(2, (3, 4, 4)))
        assert out.companion_logits_EBC is not None
        out.logits_SBC.retain_grad()
        loss = method(out, labels_B, progress)
        optimizer.zero_grad()
        loss.total.backward()
        parts = loss.parts
        loss_S = (
            options["omega"] * parts["ce_S"]
            + options["beta"] * parts["kd_S"]
            + (1 - options["omega"]) * parts["hybrid_ce"]
        )
        if step == 0:
            close(out.logits_SBC.detach(), g["logits_SBC"])
            close(out.companion_logits_EBC[0], g["hwm_logits_BC"])
            close(parts["ce_S"], g["ce_S"])
            close(parts["kd_S"], g["kd_S"])
            close(parts["hybrid_ce"], g["hwm_ce"])
            close(loss_S, g["loss_S"])
            close(out.logits_SBC.grad, g["grad_logits"])
        sums_S += loss_S
        optimizer.step()
        with torch.no_grad():
            method.after_step(cohort, progress)
    method.end_epoch(cohort, None)
    close(sums_S, g["loss_sum_S"])
    companion = method.companion
    assert companion is not None
    hybrid = companion.networks.student_state(0)
    for key in (key.removeprefix("final_hwm_") for key in g if key.startswith("final_hwm_")):
        close(torch.stack([cohort.student_state(s)[key] for s in range(S)]), g[f"final_{key}"])
        close(hybrid[key], g[f"final_hwm_{key}"])
