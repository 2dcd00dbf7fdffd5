"""Layers with code of their own: each engine gives what the students give alone, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastokd import Cohort
from fastokd.cohort.cohort import ENGINES
from fastokd.distributed.ranks import Line, Ranks
from fastokd.errors import UserError
from fastokd.learner.sync_norm import sync_norm, synchronise
from fastokd.models import Student, registry
from fastokd.models.external import ExternalStudent
from fastokd.models.layers import Dropout, NormAct, conv3x3, numbered
from fastokd.models.registry import ModelSpec
from tests.models.families import Alone

CHANNELS, SIZE = 16, 8


class Doubled(nn.Conv2d):
    """As timm's padded and standardised convolutions: the weight isn't what is convolved with."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)


class NormThenAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class HalfPool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class ShiftedNormAct(NormAct):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual) + 1


class Halved(Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Counting(nn.BatchNorm2d):
    """A buffer that is assigned anew."""

    steps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
        return super().forward(x) * (1 + self.steps)


class Net(Student):
    """A student whose parts a case replaces."""

    def __init__(
        self,
        classes: int,
        head: nn.Module | None = None,
        drop: nn.Module | None = None,
        **parts: nn.Module,
    ) -> None:
        super().__init__()
        layers = {
            "conv": conv3x3(3, CHANNELS),
            "norm": NormAct(CHANNELS),
            "pool": nn.MaxPool2d(3, 2, 1),
            "conv2": conv3x3(CHANNELS, CHANNELS),
            "norm2": NormAct(CHANNELS),
            **parts,
        }
        for name, layer in layers.items():
            self.add_module(f"{name}_", layer)
        self.fc = numbered({0: drop or nn.Identity(), 1: head or nn.Linear(CHANNELS, classes)})
        stem = tuple(f"{name}_" for name in ("conv", "norm", "pool"))
        self.chain(stem, ("conv2_", "norm2_"), head="fc", feature_dim=CHANNELS)


def forward_of_its_own(conv: nn.Conv2d) -> nn.Conv2d:
    plain = conv.forward
    conv.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]
    return conv


def hooked(conv: nn.Conv2d, before: bool) -> nn.Conv2d:
    if before:
        conv.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    else:
        conv.register_forward_hook(lambda _module, _args, y: 2 * y)
    return conv


def other_momentum(norm: NormAct, momentum: float | None) -> NormAct:
    norm.momentum = momentum
    return norm


def conv(
    kind: Callable[..., nn.Conv2d] = nn.Conv2d, inputs: int = 3, **options: object
) -> nn.Conv2d:
    return kind(inputs, CHANNELS, 3, **{"padding": 1, **options})


def twice() -> dict[str, nn.Module]:
    layer = conv(inputs=CHANNELS)
    return {"conv2": layer, "norm2": nn.Sequential(NormAct(CHANNELS), layer)}


def tied() -> dict[str, nn.Module]:
    first, second = conv(inputs=CHANNELS), conv(inputs=CHANNELS)
    second.weight = first.weight
    return {"conv2": first, "norm2": nn.Sequential(NormAct(CHANNELS), second)}


CASES: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "subclass": lambda: {"conv": conv(Doubled)},
    "inner subclass": lambda: {"conv2": conv(Doubled, CHANNELS)},
    "weight norm": lambda: {"conv": parametrizations.weight_norm(conv())},
    "spectral norm": lambda: {"conv": parametrizations.spectral_norm(conv())},
    "forward": lambda: {"conv": forward_of_its_own(conv())},
    "inner forward": lambda: {"conv2": forward_of_its_own(conv(inputs=CHANNELS))},
    "hook before": lambda: {"conv": hooked(conv(), True)},
    "hook after": lambda: {"conv2": hooked(conv(inputs=CHANNELS), False)},
    "reflect": lambda: {"conv": conv(padding_mode="reflect")},
    "same padding": lambda: {"conv": conv(padding="same")},
    "norm and act": lambda: {"norm": NormThenAct(CHANNELS)},
    "fused subclass": lambda: {"norm": ShiftedNormAct(CHANNELS)},
    "other buffers": lambda: {"norm": Counting(CHANNELS)},
    "no affine": lambda: {"norm": nn.BatchNorm2d(CHANNELS, affine=False)},
    "no statistics": lambda: {"norm": nn.BatchNorm2d(CHANNELS, track_running_stats=False)},
    "all batches": lambda: {"norm": nn.BatchNorm2d(CHANNELS, momentum=None)},
    "all batches, fused": lambda: {"norm": other_momentum(NormAct(CHANNELS), None)},
    "pool": lambda: {"pool": HalfPool(3, 2, 1)},
    "linear": lambda: {"head": Scaled(CHANNELS, 10)},
    "dropout": lambda: {"drop": Halved(0.5, CHANNELS)},
    "twice": twice,
    "tied": tied,
}


@pytest.fixture
def cohort_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cohort]:
    def new(builds: list[Callable[[int], Student]], sharing: str = "network") -> Cohort:
        for index, build in enumerate(builds):
            spec = ModelSpec(f"net{index}", build, SIZE, "")
            monkeypatch.setitem(registry._SPECS, spec.name, spec)
        return Cohort([f"net{index}" for index in range(len(builds))], 10, sharing=sharing).double()

    return new


@pytest.mark.parametrize("case", CASES)
def test_an_engine_runs_the_students_as_they_are(
    case: str, cohort_of: Callable[..., Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec("net", lambda classes: Net(classes, **CASES[case]()), SIZE, "")
    monkeypatch.setitem(registry._SPECS, "net", spec)
    for sharing in ("network", "branch"):
        ran = []
        cohort = Cohort(("net", 2), 10, sharing=sharing).double()
        alone = Alone(cohort)
        for engine in ENGINES:
            reason = refusal(cohort, engine)
            if reason:
                assert "use loop" in reason
            else:
                alone.compare(cohort)
                ran.append(engine)
        assert "loop" in ran


def refusal(cohort: Cohort, engine: str) -> str:
    try:
        cohort.set_engine(engine)
    except UserError as error:
        return str(error)
    return ""


class Written(nn.Module):
    """Another library's classifier that writes to its images, and calls a layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, CHANNELS, 3), nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.fc(self.conv(input=x).mean((2, 3)))


def test_images_that_a_student_writes_to_are_its_own(
    cohort_of: Callable[..., Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lambda classes: ExternalStudent(Written(), "written", classes, SIZE)  # noqa: E731
    monkeypatch.setitem(registry._SPECS, "net", ModelSpec("net", build, SIZE, ""))
    cohort = Cohort(("net", 2), 10, sharing="network").double()
    Alone(cohort).compare(cohort)


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_students_of_other_settings_are_a_mixed_cohort(
    engine: str, cohort_of: Callable[..., Cohort]
) -> None:
    """The weights' shapes and the layers' classes are the same."""
    settings = ({"stride": 2}, {"padding_mode": "reflect"}, {"dilation": 2})
    builds = [partial(_with_conv, options) for options in ({}, *settings)]
    cohort = cohort_of(builds)
    Alone(cohort).compare(cohort)
    with pytest.raises(UserError, match="mixed cohort: use loop"):
        cohort.set_engine(engine)


def _with_conv(options: dict[str, object], classes: int) -> Student:
    return Net(classes, conv=conv(**options))


@pytest.mark.parametrize("name", ["timm:tf_mobilenetv3_small_minimal_100", "timm:test_nfnet"])
def test_networks_whose_convolutions_are_subclasses(name: str) -> None:
    pytest.importorskip("timm")
    cohort = Cohort((name, 2), 10, sharing="network", image_size=32).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits_SBC = cohort(images).logits_SBC
        alone_SBC = torch.stack([cohort.student(s)(images) for s in range(2)])
    torch.testing.assert_close(logits_SBC, alone_SBC, rtol=1e-9, atol=1e-9)


def test_sync_bn_refuses_norms_with_code_of_their_own(
    cohort_of: Callable[..., Cohort],
) -> None:
    ranks = Ranks(data=Line(0, 2))
    for kind in (NormThenAct, ShiftedNormAct):
        cohort = cohort_of([lambda classes, kind=kind: Net(classes, norm=kind(CHANNELS))])
        with pytest.raises(UserError, match=rf"{kind.__name__}, .* leave --sync-bn out"):
            synchronise(cohort, nn.Module(), ranks)


@pytest.mark.filterwarnings("ignore:.torch.distributed:FutureWarning")
@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_sync_bn_of_a_norm_without(options: dict[str, object]) -> None:
    """Of one rank, it is the norm itself: values, gradients, statistics, and in eval mode."""
    ours, theirs = (nn.BatchNorm2d(4, **options).double() for _ in range(2))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            y, z = sync_norm(ours, x, line=Line(0, 1)), theirs(x)
            torch.testing.assert_close(y, z)
            grads = [torch.autograd.grad((out**3).sum(), x)[0] for out in (y, z)]
            torch.testing.assert_close(*grads)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    torch.testing.assert_close(sync_norm(ours.eval(), x, line=Line(0, 1)), theirs.eval()(x))
