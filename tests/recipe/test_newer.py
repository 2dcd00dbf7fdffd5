"""The recipes of the newer methods, read off what is published once more."""

from __future__ import annotations

import pytest

from fastokd.errors import UserError
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


def test_mcls_numbers() -> None:
    """Students by the name's count, logits and memory by the column; ensembles are the same runs."""
    for cell in cells_of("mcl"):
        r = recipe(cell.recipe)
        okd, imagenet = "MCL-OKD" in cell.column, r.dataset == "imagenet"
        assert (r.method, r.model) == ("mcl", cell.row), cell
        assert r.dataset == cell.column.split(", ")[-1], cell
        assert r.students == (2 if "x2" in cell.column else 4), cell
        assert r.method_options.get("logit_distill", False) == ("logits" in cell.column), cell
        assert (r.reported == "ensemble_logits") == ("ensemble" in cell.column), cell
        assert cell.unit == ("error" if okd else "accuracy"), cell
        assert r.method_options.get("tau", 0.1) == (0.07 if imagenet else 0.1), cell
    shared = recipe("mcl-branch-okd-ensemble@4/resnet34/imagenet")
    assert (shared.epochs, shared.batch_size, shared.lr) == (100, 128, 0.05)
    assert (shared.weight_decay, shared.schedule) == (1e-4, "cosine")
    assert shared.method_options["negatives"] == 16384


def test_dists_teachers() -> None:
    with pytest.raises(
        UserError, match="names a teacher on ImageNet, but the data set is cifar100"
    ):
        recipe("dist-resnet50/resnet20/cifar100")
    for cell in cells_of("dist"):
        r = recipe(cell.recipe)
        teacher = cell.column.split(", ")[0]
        assert (r.model, r.teacher) == (cell.row, f"baseline/{teacher}/{r.dataset}"), cell
    assert (
        recipe("dist-resnet50/resnet18/imagenet").method_options
        == recipe("dist/resnet18/imagenet").method_options
    )
