"""Initialisation as published, and the layers that an engine may swap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastokd.errors import UserError
from fastokd.models import Student, create_model, list_models, model_spec, register_model
from fastokd.models.layers import ConcatChannels, Dropout, NormAct

FAN_IN = {"densenet_40_12"}


@pytest.mark.parametrize("name", ["resnet110", "vgg16", "densenet_40_12", "wrn_16_2", "googlenet"])
def test_initialisation(name: str) -> None:
    model = create_model(name, 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            outputs, inputs, k, _ = module.weight.shape
            fan = (inputs if name in FAN_IN else outputs) * k * k
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.06)
        if isinstance(module, NormAct):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)
    head = getattr(model, model.head_name)
    if name == "vgg16":
        weights = [module for module in head if isinstance(module, nn.Linear)]
        assert all(w.weight.std().item() == pytest.approx(0.01, rel=0.06) for w in weights)
        assert all(torch.all(w.bias == 0) for w in weights)
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert all(torch.all(conv.bias == 0) for conv in convs if conv.bias is not None)
    else:
        # torch's own: uniform within 1 / sqrt(inputs).
        assert head.weight.abs().max().item() == pytest.approx(head.in_features**-0.5, rel=0.02)


def test_wide_resnet_momentum() -> None:
    model = create_model("wrn_16_2", 10)
    momenta = {n: m.momentum for n, m in model.named_modules() if isinstance(m, NormAct)}
    assert momenta.pop("bn1") == 0.9
    assert set(momenta.values()) == {0.1}


def test_vgg_dropout() -> None:
    options = model_spec("vgg16").branch_options
    assert options == {"dropout": 0.5}
    for model, p in ((create_model("vgg16", 10), 0.0), (create_model("vgg16", 10, **options), 0.5)):
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [p, p]
    assert all(not model_spec(name).branch_options for name in list_models() if "vgg" not in name)


@pytest.mark.parametrize("name", list_models())
def test_only_swappable_layers_know_their_channels(name: str) -> None:
    """An engine that stacks students along channels must find every such layer as a module, and
    nothing may change a tensor that a map or a residual still needs."""
    with torch.device("meta"):
        model = create_model(name, 10)
    known = (nn.Conv2d, nn.Linear, NormAct, ConcatChannels, nn.MaxPool2d, nn.AvgPool2d)
    plain = (nn.ReLU, nn.Dropout, type(model.pool), nn.Sequential)
    for module in model.modules():
        leaf = next(module.children(), None) is None
        assert not leaf or isinstance(module, known + plain), type(module)
        assert not getattr(module, "inplace", False)
        assert not isinstance(module, nn.BatchNorm2d) or isinstance(module, NormAct)


def test_a_given_dropout_mask_serves_one_forward() -> None:
    """A student that is trained on by itself, after an engine, draws its own again."""
    layer, x_BD = Dropout(0.5, 64), torch.ones(3, 64)
    layer.mask_BD = torch.full((3, 64), 2.0)
    assert torch.equal(layer(x_BD), 2 * x_BD)
    assert (layer(x_BD) == 0).any()
    assert layer(torch.ones(5, 64)).shape == (5, 64)


def test_norm_act_is_norm_residual_and_relu() -> None:
    plain = nn.BatchNorm2d(3)
    x_BCHW = torch.randn(2, 3, 4, 4)
    for impl in ("torch", "auto"):
        norm = NormAct(3)
        norm.impl = impl
        torch.testing.assert_close(norm(x_BCHW, x_BCHW), torch.relu(plain(x_BCHW) + x_BCHW))


def test_what_a_user_can_get_wrong() -> None:
    with pytest.raises(UserError, match="did you mean resnet32"):
        create_model("resnet_32", 10)
    with pytest.raises(UserError, match="num_classes is 1"):
        create_model("resnet32", 1)
    with pytest.raises(UserError, match="registered already"):
        register_model("resnet32", lambda num_classes: Student(), input_size=32, about="")
