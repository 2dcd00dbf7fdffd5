"""Classifiers of torchvision and timm as students: the same network, cut where it is a chain."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fastokd import Cohort
from fastokd.errors import UserError
from fastokd.models import create_model, list_models, model_info, trunk_shape
from fastokd.models.external import ExternalStudent

SPLITS = [
    ("torchvision:mobilenet_v2", "features.13"),
    # Its classifier is a convolution.
    ("torchvision:squeezenet1_1", "features.7"),
    ("timm:mobilenetv3_small_100", "blocks.4"),
    # Tokens, and a parameter of the network's own.
    ("timm:vit_tiny_patch16_224", "blocks.5"),
]


def new(name: str, **options: object) -> ExternalStudent:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = create_model(name, 10, **options)
    assert isinstance(model, ExternalStudent)
    return model


@pytest.mark.parametrize(("name", "split_at"), SPLITS)
@torch.no_grad()
def test_trunk_and_branch_make_the_whole(name: str, split_at: str) -> None:
    options = {"img_size": 64, "input_size": 64} if "vit" in name else {}
    x_BCHW = torch.randn(2, 3, 64, 64)
    whole = new(name, **options)
    with torch.device("meta"):
        trunk, branch = (new(name, split_at=split_at, **options) for _ in range(2))
    uncut = copy.deepcopy(branch)
    assert trunk.branch_from == 1
    trunk.keep_stages(0, 1)
    branch.keep_stages(1, None)
    state = whole.state_dict()
    uncut.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    keys = [set(part.state_dict()) for part in (trunk, branch)]
    assert keys[0]
    assert keys[1]
    assert keys[0] | keys[1] == set(state)
    assert not keys[0] & keys[1]
    for part, own in zip((trunk, branch), keys, strict=True):
        part.load_state_dict({key: state[key].clone() for key in own}, assign=True)

    for training in (False, True):
        for model in (whole, trunk, branch, uncut):
            model.train(training)
        torch.manual_seed(1)
        want = whole.outputs(x_BCHW)
        torch.manual_seed(1)
        trunk_out, trunk_maps = trunk.trunk(x_BCHW, 1)
        got = branch.outputs(trunk_out, 1)
        assert torch.equal(got.logits_BC, want.logits_BC)
        assert torch.equal(got.features_BD, want.features_BD)
        assert got.features_BD.shape == (2, whole.feature_dim)
        maps = trunk_maps + got.maps
        assert len(maps) == len(want.maps) == (0 if "vit" in name else 4)
        assert all(torch.equal(a, b) for a, b in zip(maps, want.maps, strict=True))
        torch.manual_seed(1)
        assert torch.allclose(uncut(x_BCHW), want.logits_BC)
    assert all(torch.equal(value, state[key]) for key, value in branch.state_dict().items())


def test_keys_are_the_library_s() -> None:
    model = new("torchvision:mobilenet_v2")
    with torch.device("meta"):
        theirs = models.mobilenet_v2(num_classes=10)
    assert [model.published_key(key) for key in model.state_dict()] == list(theirs.state_dict())


def test_counts_are_those_of_our_own_resnet18() -> None:
    theirs, ours = model_info("torchvision:resnet18", 1000), model_info("resnet18", 1000)
    assert (theirs.params, theirs.macs) == (ours.params, ours.macs)
    assert (theirs.feature_dim, theirs.maps) == (ours.feature_dim, ours.maps)
    shape = trunk_shape("torchvision:resnet18", 10, split_at="layer2")
    assert shape == trunk_shape("resnet18", 10) == (128, 28, 28)


MAPS = {
    "torchvision:mobilenet_v2": [[24, 56, 56], [32, 28, 28], [96, 14, 14], [1280, 7, 7]],
    # The block before a transition, not what is inside the transition.
    "torchvision:densenet121": [[256, 56, 56], [512, 28, 28], [1024, 14, 14], [1024, 7, 7]],
    # The classifier is a convolution: its output is no map.
    "torchvision:squeezenet1_1": [[64, 111, 111], [128, 55, 55], [256, 27, 27], [512, 13, 13]],
    # 299 pixels; behind the last inception module of each size, not inside the next.
    "torchvision:inception_v3": [[192, 71, 71], [288, 35, 35], [768, 17, 17], [2048, 8, 8]],
    # Its constructor computes with tensors.
    "torchvision:regnet_x_400mf": [[32, 56, 56], [64, 28, 28], [160, 14, 14], [400, 7, 7]],
    # Maps with the channels last: none that FFSD could use.
    "torchvision:swin_t": [],
    "timm:mobilenetv3_small_100": [[16, 56, 56], [24, 28, 28], [48, 14, 14], [576, 7, 7]],
    "timm:convnext_atto": [[40, 56, 56], [80, 28, 28], [160, 14, 14], [320, 7, 7]],
}


@pytest.mark.parametrize("name", MAPS)
def test_maps(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert model_info(name, 10).maps == MAPS[name]


def test_features_are_free_of_dropout() -> None:
    model = new("torchvision:mobilenet_v2").train()
    x_BCHW = torch.randn(2, 3, 64, 64)
    first, second = model.outputs(x_BCHW), model.outputs(x_BCHW)
    assert torch.equal(first.features_BD, second.features_BD)
    assert not torch.equal(first.logits_BC, second.logits_BC)


def test_a_copy_has_taps_of_its_own() -> None:
    model = new("torchvision:squeezenet1_1").eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        output = other.outputs(torch.randn(1, 3, 64, 64))
    assert len(output.maps) == 4
    assert not model._taken
    assert not other._taken


def test_a_state_without_versions_is_loaded() -> None:
    """torchvision's MNASNet asks for its version, which no file of ours holds."""
    cohort = Cohort(("torchvision:mnasnet0_5", 1), 10, sharing="network")
    state = {key: value + 1 for key, value in cohort.state_dict().items()}
    cohort.load_state_dict(state)
    alone = cohort.student(0).state_dict()
    assert all(torch.equal(alone[key], state[f"students.0.{key}"]) for key in alone)


def test_every_parameter_learns() -> None:
    model = new("torchvision:mobilenet_v2", split_at="features.13")
    x_BCHW = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    output = model.outputs(x_BCHW)
    (output.logits_BC.logsumexp(1).sum() + output.features_BD.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(getattr(module, "inplace", False) for module in model.modules())


Between = Callable[["Small", Tensor, Tensor], Tensor]


class Small(nn.Module):
    """Two convolutions and a classifier; ``between`` is what happens behind the first one."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.between = between
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self, x, self.first(x)).mean((2, 3)))


def chain(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(y)


def jump(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(y) + x.mean()


def writes(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(y.mul_(2))


def resizes(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(y if y.shape[0] > 1 else y * 1)


def twice(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(y) + net.first(x).mean()


@pytest.mark.parametrize(
    ("between", "split_at", "message"),
    [
        (jump, "first", "also reads x_bchw"),
        (writes, "first", "changes its output in place"),
        (resizes, "first", "can't be followed"),
        (twice, "first", "calls 2 times"),
        (chain, "third", "there is fc, first, second"),
    ],
)
def test_where_a_split_is_refused(between: Between, split_at: str, message: str) -> None:
    ExternalStudent(Small(chain), "small", 10, 16, split_at="first")
    with pytest.raises(UserError, match=message):
        ExternalStudent(Small(between), "small", 10, 16, split_at=split_at)


def relu_in_place(net: Small, x: Tensor, y: Tensor) -> Tensor:
    return net.second(torch.nn.functional.relu(y, inplace=True))


def add_in_place(net: Small, x: Tensor, y: Tensor) -> Tensor:
    y += 1
    return net.second(y)


@pytest.mark.parametrize("between", [relu_in_place, add_in_place])
@torch.no_grad()
def test_what_writes_to_the_cut_is_made_to_copy(between: Between) -> None:
    model = ExternalStudent(Small(between), "small", 10, 16, split_at="first")
    x_BCHW = torch.randn(2, 3, 16, 16)
    trunk, _ = model.trunk(x_BCHW, 1)
    before = trunk.clone()
    assert torch.equal(model.outputs(trunk, 1).logits_BC, model.net(x_BCHW))
    assert torch.equal(trunk, before)


def test_tied_weights_are_refused() -> None:
    net = Small(chain)
    net.first = nn.Conv2d(3, 8, 3)
    net.second.bias = net.first.bias
    with pytest.raises(UserError, match="used on both sides"):
        ExternalStudent(net, "small", 10, 16, split_at="first")


def test_each_part_keeps_the_tensors_of_the_network_itself_that_it_uses() -> None:
    """Parameters and buffers that belong to no layer: each is in one part, and none is lost."""

    class Shifted(Small):
        def __init__(self) -> None:
            super().__init__(chain)
            self.early, self.late = (nn.Parameter(torch.ones(())) for _ in range(2))
            for name in ("mean", "scale", "unused"):
                self.register_buffer(name, torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first((x - self.mean) * self.early)).mean((2, 3))
            return self.fc(y * self.scale * self.late)

    trunk, branch = (
        ExternalStudent(Shifted(), "shifted", 10, 16, split_at="first") for _ in range(2)
    )
    trunk.keep_stages(0, 1)
    branch.keep_stages(1, None)
    first = ["first.bias", "first.weight", "early", "mean"]
    assert set(trunk.state_dict()) == {f"net.{name}" for name in first}
    rest = ["second.bias", "second.weight", "fc.bias", "fc.weight", "late", "scale", "unused"]
    assert set(branch.state_dict()) == {f"net.{name}" for name in rest}


def test_training_mode_may_run_other_code() -> None:
    """A functional dropout behind the cut is traced in both modes."""

    class Dropping(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x)).mean((2, 3))
            return self.fc(nn.functional.dropout(y, 0.5, self.training))

    model = ExternalStudent(Dropping(chain), "dropping", 10, 16, split_at="first")
    x_BCHW = torch.randn(2, 3, 16, 16)
    model.eval()
    assert torch.equal(model(x_BCHW), model(x_BCHW))
    model.train()
    assert not torch.equal(model(x_BCHW), model(x_BCHW))


def test_what_a_user_can_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"split_at .*layer1 or layer2 or layer3"):
        _ = new("torchvision:resnet18").branch_from
    with pytest.raises(UserError, match="also reads"):
        new("torchvision:resnet18", split_at="layer1.0.conv1")
    with pytest.raises(UserError, match="calls 2 times"):
        new("torchvision:resnet18", split_at="layer1.0.relu")
    with pytest.raises(UserError, match="did you mean mobilenet_v2"):
        create_model("torchvision:mobilenetv2", 10)
    with pytest.raises(UserError, match=r"there is alexnet, .* and 20 more"):
        create_model("torchvision:zzz", 10)
    with pytest.raises(UserError, match="use torchvision or timm"):
        create_model("keras:resnet18", 10)
    with pytest.raises(UserError, match="would fetch weights"):
        create_model("torchvision:resnet18", 10, weights="DEFAULT")
    with pytest.raises(UserError, match="doesn't take depth=3"):
        create_model("torchvision:resnet18", 10, depth=3)
    with pytest.raises(UserError, match="doesn't run on 3x32x32"):
        create_model("torchvision:alexnet", 10, input_size=32)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        create_model("timm:resnet18", 10)
    assert not any(":" in name for name in list_models())


def test_a_foreign_branch_cohort() -> None:
    options = {"split_at": "features.7"}
    cohort = Cohort(("torchvision:squeezenet1_1", 2), 10, model_options=options).eval()
    x_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = cohort(x_BCHW)
        alone = cohort.student(1).eval()(x_BCHW)
    assert cohort.shape.trunk_channels == 256
    # What both students read is one convolution in the cohort, which rounds otherwise.
    torch.testing.assert_close(output.logits_SBC[1], alone)
