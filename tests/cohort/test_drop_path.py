"""Stochastic depth: torchvision's and timm's on the same draws, in every engine that takes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import DropPath as Timms
from torch import nn
from torchvision.ops import StochasticDepth

from fastokd.benchmark.loops import OurLoop
from fastokd.cohort import Cohort
from fastokd.cohort.dropout import DropoutMasks
from fastokd.errors import UserError
from fastokd.models import create_model, external
from fastokd.models.external import ExternalStudent
from fastokd.models.layers import DropPath
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions

RATE = 0.4


class Block(nn.Module):
    """``x + drop(conv(x))``."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.conv(x))


class Net(nn.Module):
    """Three blocks; a classifier."""

    def __init__(self, *drops: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*map(Block, drops))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def drops() -> list[nn.Module]:
    return [StochasticDepth(RATE, "row"), StochasticDepth(RATE, "batch"), Timms(RATE)]


def students(monkeypatch: pytest.MonkeyPatch, *more: nn.Module) -> Cohort:
    """Two in a cohort."""

    def create(name: str, num_classes: int, **_: Any) -> ExternalStudent:
        return ExternalStudent(Net(*drops(), *more), name, num_classes, 16)

    monkeypatch.setattr("fastokd.cohort.cohort.create_model", create)
    return Cohort(("torchvision:resnet18", 2), 10, sharing="network", image_size=32).double()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def theirs_of(kind: nn.Module, x: torch.Tensor, keep_B: torch.Tensor) -> torch.Tensor:
    """What the library's layer gives where its generator draws ``keep_B``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "bernoulli_",
            lambda self, p: self.copy_(keep_B[: len(self)].view_as(self)),
        )
        out: torch.Tensor = kind.train()(x)
        return out


@pytest.mark.parametrize("kind", [*drops(), Timms(RATE, scale_by_keep=False)])
def test_on_the_same_draws_it_is_the_librarys(kind: nn.Module) -> None:
    holder = nn.Sequential(kind)
    external.use_drop_paths(holder)
    (ours,) = holder
    assert isinstance(ours, DropPath)
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    u_B = torch.rand(8)
    ours.mask_B = ours.masks(u_B)
    expected = theirs_of(kind, x, (u_B >= RATE).double())
    torch.testing.assert_close(ours.train()(x), expected, rtol=0, atol=1e-9)
    assert ours.eval()(x) is x


def test_engines_drop_the_same_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = students(monkeypatch)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    found = []
    for engine in ("loop", "vmap"):
        cohort.set_engine(engine)
        torch.manual_seed(3)
        logits = cohort.train()(x).logits_SBC
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in cohort.parameters())])
        cohort.zero_grad(set_to_none=True)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.manual_seed(4)
    assert not torch.equal(cohort(x).logits_SBC.detach(), found[0][0])
    assert len(DropoutMasks(list(cohort._members())).paths) == 3


def test_a_layer_that_draws_by_itself_is_refused_by_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = students(monkeypatch, nn.Dropout(0.5))
    with pytest.raises(UserError, match=r"can't draw the masks of net.blocks.3.drop \(Dropout\)"):
        cohort.set_engine("vmap")
    with pytest.raises(UserError, match="another library's"):
        cohort.set_engine("grouped")


@pytest.mark.parametrize(
    ("name", "options", "rates"),
    [
        ("torchvision:convnext_tiny", {"stochastic_depth_prob": 0.3}, {0.3}),
        ("timm:convnext_atto", {"drop_path_rate": 0.2}, {0.2}),
    ],
)
def test_the_libraries_options_reach_their_layers(
    name: str, options: dict[str, float], rates: set[float]
) -> None:
    """The last block has the rate that was asked for; earlier ones less."""
    with torch.device("meta"):
        student = create_model(name, 10, **options)
    paths = [module for module in student.modules() if isinstance(module, DropPath)]
    assert len(paths) > 4
    assert len({path.p for path in paths}) == len(paths)
    assert {round(paths[-1].p, 6)} == rates


def test_a_resumed_run_drops_what_it_would_have_dropped() -> None:
    """After other numbers were drawn; to the bit."""
    one = recipe("dml@2/timm:test_convnext/digits", batch_size=4, drop_path_rate=0.5)
    options = RunOptions(device="cpu", precision="fp32", engine="loop", quiet=True)
    whole, resumed = (OurLoop(one, options) for _ in range(2))
    whole.step()
    tensors, facts = copy.deepcopy(whole.session.state())
    ends = [whole.step().item()]
    wanted = copy.deepcopy(whole.session.state()[0])
    resumed.session.load_state({**tensors, "rng.cpu": torch.get_rng_state()}, facts)
    ends.append(resumed.step().item())
    torch.manual_seed(5)
    resumed.session.load_state(tensors, facts)
    ends.append(resumed.step().item())
    assert ends[0] == ends[2] != ends[1]
    found = resumed.session.state()[0]
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []
