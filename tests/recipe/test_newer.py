"""The recipes of PCL and OKDPH, read off what is published once more."""

from __future__ import annotations

import pytest

from fastokd.recipe.cells import cells_of
from fastokd.recipe.names import recipe


@pytest.mark.parametrize("method", ["okdph", "pcl"])
def test_each_published_number_has_a_recipe(method: str) -> None:
    for cell in cells_of(method):
        r = recipe(cell.recipe)
        assert cell.source, cell
        assert (r.method, r.model) == (method, cell.row), cell
        assert (r.lr, r.momentum, r.nesterov) == (0.1, 0.9, method == "pcl"), cell
        assert (r.students, r.ramp_epochs > 0) == ((3, True) if method == "pcl" else (2, False))
        assert (r.views, r.number_of_views) == ("student", 3), cell
        assert r.epochs == (90 if r.dataset == "imagenet" else 300), cell
        assert r.method_options["temperature"] == (3.0 if method == "pcl" else 4.0), cell


@pytest.mark.parametrize(
    ("name", "options", "kinds"),
    [
        ("resnet32/cifar100", (1.0, 0.5, 1.0, "batch", 5), "rotation+cutout+randaugment"),
        ("resnet110/cifar100", (0.8, 0.8, 0.5, "batch", 5), "rotation+cutout+randaugment"),
        ("vgg16/cifar100", (0.3, 0.3, 1.0, "epoch", 1), "rotation+cutout+randaugment"),
        ("resnet32/cifar10", (0.8, 0.8, 0.5, "epoch", 1), "plain+cutout+randaugment"),
        ("resnet110/cifar10", (0.8, 0.8, 0.5, "batch", 5), "plain+cutout+randaugment"),
        ("resnet18/imagenet", (0.8, 0.8, 0.5, "batch", 5), ""),
    ],
)
def test_okdphs_settings(name: str, options: tuple[object, ...], kinds: str) -> None:
    r = recipe(f"okdph/{name}")
    wanted = dict(zip(("omega", "beta", "gamma", "fusion", "gap"), options, strict=True))
    assert r.method_options == {"temperature": 4.0, **wanted}
    assert r.view_kinds == kinds


def test_pcls_heads_are_equal_but_for_vgg() -> None:
    assert "equal_heads" not in recipe("pcl/resnet32/cifar100").method_options
    assert recipe("pcl/vgg16/cifar100").method_options["equal_heads"] is False
