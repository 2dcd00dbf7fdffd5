"""Engines give the same numbers: outputs, gradients and running statistics, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Cohort
from fastokd.errors import UserError
from fastokd.models import model_spec


def step(cohort: Cohort, engine: str, images: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and state after one training forward and backward."""
    cohort = copy.deepcopy(cohort)
    cohort.set_engine(engine)
    torch.manual_seed(1)
    out = cohort.train()(images)
    weights = torch.randn(out.logits_SBC.shape, dtype=torch.float64)
    loss = (out.logits_SBC * weights).sum() + sum(f.square().sum() for f in out.features)
    loss = loss + sum(m.square().mean() for maps in out.maps for m in maps)
    loss.backward()
    found = {f"out.features.{s}": f for s, f in enumerate(out.features)}
    found |= {f"out.map.{s}.{i}": m for s, ms in enumerate(out.maps) for i, m in enumerate(ms)}
    found |= {f"state.{key}": value for key, value in cohort.state_dict().items()}
    for key, parameter in cohort.named_parameters():
        assert parameter.grad is not None, key
        found[f"grad.{key}"] = parameter.grad
    return {"out.logits": out.logits_SBC, **found}


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "densenet_40_12"])
def test_engines_equal_the_loop(name: str, sharing: str, engine: str) -> None:
    same(name, sharing, engine)


@pytest.mark.proof
@pytest.mark.parametrize(("sharing", "engine"), [("network", "grouped"), ("branch", "vmap")])
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "resnet110",
        "vgg16",
        "wrn_20_8",
        "googlenet",
        "densenet_40_12_uncompressed",
        "resnet18",
    ],
)
def test_engines_equal_the_loop_for_every_family(name: str, sharing: str, engine: str) -> None:
    same(name, sharing, engine)


def same(name: str, sharing: str, engine: str) -> None:
    size = 32 if model_spec(name).input_size == 32 else 64
    options = {"dropout": 0.5} if name.startswith("vgg") else {}
    cohort = Cohort((name, 2), 10, sharing=sharing, model_options=options).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    ours, theirs = step(cohort, engine, images), step(cohort, "loop", images)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            ours[key], value, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_dropout_masks_are_one_draw_for_every_engine() -> None:
    """With dropout the engines agree only because the masks are drawn once; they do drop."""
    cohort = Cohort(("vgg16", 2), 10, model_options={"dropout": 0.5}).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    dropped = step(cohort, "loop", images)["out.logits"]
    for engine in ("grouped", "vmap"):
        found = step(cohort, engine, images)["out.logits"]
        torch.testing.assert_close(found, dropped, rtol=1e-9, atol=1e-9)
    plain = Cohort(("vgg16", 2), 10).double()
    plain.load_state_dict(cohort.state_dict())
    assert not torch.allclose(dropped, step(plain, "loop", images)["out.logits"])
    cohort.eval()
    torch.testing.assert_close(cohort(images).logits_SBC, plain.eval()(images).logits_SBC)


def test_a_run_may_change_its_engine_between_steps() -> None:
    """loop, grouped, vmap, loop, momentum included: as four steps of the loop."""

    def train(engines: list[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        torch.manual_seed(2)
        cohort = Cohort(("resnet8", 2), 10).double()
        optimizer = torch.optim.SGD(cohort.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for engine in engines:
            cohort.set_engine(engine)
            images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
            cohort(images).logits_SBC.logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        momenta = [optimizer.state[p]["momentum_buffer"] for p in cohort.parameters()]
        return cohort.state_dict(), momenta

    ours, theirs = train(["loop", "grouped", "vmap", "loop"]), train(["loop"] * 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_eval_mode_agrees_and_moves_no_statistics(engine: str) -> None:
    cohort = Cohort(("resnet8", 2), 10).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in cohort.state_dict().items()}
    theirs = cohort(images).logits_SBC
    cohort.set_engine(engine)
    torch.testing.assert_close(cohort(images).logits_SBC, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cohort.state_dict(), before, rtol=0, atol=0)


def test_a_shared_input_is_one_dense_convolution() -> None:
    """The first convolution of every branch, its shortcut, and a network cohort's stem."""
    branch = [[4 * 64, 32, 1, 1], [4 * 64, 32, 3, 3]]
    for sharing, dense in (("branch", branch), ("network", [[4 * 16, 3, 3, 3]])):
        cohort = Cohort(("resnet8", 4), 10, sharing=sharing, engine="grouped")
        with torch.profiler.profile(record_shapes=True) as profile:
            cohort(torch.randn(2, 3, 32, 32))
        weights = [e.input_shapes[1] for e in profile.events() if e.name == "aten::convolution"]
        trunk, rest = (0, 8) if sharing == "network" else (6, 1)
        assert len(weights) == trunk + len(dense) + rest
        assert sorted((w for w in weights if w in dense), key=str) == dense


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_engines_take_bf16(engine: str) -> None:
    cohort = Cohort(("resnet8", 2), 10).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = cohort(images).logits_SBC
        cohort.set_engine(engine)
        ours = cohort(images).logits_SBC
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
@pytest.mark.parametrize("other", ["wrn_16_2", "resnet20"])
def test_a_mixed_cohort_is_refused_with_what_would_work(engine: str, other: str) -> None:
    """Also where both are of one class: another depth is another network."""
    with pytest.raises(UserError, match="mixed cohort: use loop"):
        Cohort(["resnet8", other], 10, sharing="network", engine=engine)
