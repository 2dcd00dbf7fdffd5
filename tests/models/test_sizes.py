"""What images a student takes, and how few at once: found out before a folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

import fastokd
from fastokd.errors import UserError
from fastokd.methods import create_method
from fastokd.models import least_batch, registry, sizes
from fastokd.models.external import ExternalStudent
from fastokd.models.info import map_shapes
from fastokd.models.registry import ModelSpec
from fastokd.plan.plan import plan
from fastokd.run.build import build
from fastokd.run.options import RunOptions

QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "engine": "loop", "quiet": True}
COUNT = 21


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("resnet8", 32, 1),
        ("resnet8", 4, 2),  # the last maps are 1x1
        ("resnet18", 32, 2),
        ("torchvision:resnet18", 64, 1),
        ("torchvision:squeezenet1_1", 32, 1),  # it has no norms
        ("torchvision:mobilenet_v3_small", 32, 2),
    ],
)
def test_the_fewest_images_that_norms_need(name: str, size: int, least: int) -> None:
    assert least_batch(name, 10, {}, (size, size)) == least


class Reading(nn.Module):
    """Another library's classifier that reads values while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((2, 3)))
        return y / y.abs().max().item() if self.training else y


def test_a_student_whose_training_reads_values_is_given_any_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = lambda classes: ExternalStudent(Reading(), "reading", classes, 32)  # noqa: E731
    monkeypatch.setitem(registry._SPECS, "reading", ModelSpec("reading", build, 32, ""))
    assert least_batch("reading", 10, {}, (32, 32)) == 1


class Emptying(nn.Module):
    """A classifier of images of 64 pixels and more: of smaller ones a cut leaves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.then, self.fc = nn.ZeroPad2d(-16), nn.ReLU(), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.then(self.cut(x)).mean((2, 3)))
        return y


def test_an_answer_is_of_the_name_and_of_what_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found once a process for each student: another under the same name is looked at again."""
    assert least_batch("resnet8", 10, {}, (4, 4)) == 2
    spec = ModelSpec("resnet8", registry.model_spec("wrn_16_2").build, 32, "")
    monkeypatch.setitem(registry._SPECS, "resnet8", spec)
    assert least_batch("resnet8", 10, {}, (16, 16)) == 1
    widths = [channels for channels, _, _ in map_shapes("resnet8", 10, {}, 32)]
    monkeypatch.undo()
    assert widths != [channels for channels, _, _ in map_shapes("resnet8", 10, {}, 32)]
    monkeypatch.setattr(sizes, "create_model", None)
    assert least_batch("resnet8", 10, {}, (4, 4)) == 2


def test_the_first_layer_that_leaves_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = lambda classes: ExternalStudent(Emptying(), "emptying", classes, 64)  # noqa: E731
    monkeypatch.setitem(registry._SPECS, "emptying", ModelSpec("emptying", build, 64, ""))
    with pytest.raises(UserError, match=r"32x32 \(ZeroPad2d gives \[2, 3, 0, 0\]\): of the usual"):
        least_batch("emptying", 10, {}, (32, 32))


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("vgg16", 24, "can't take images of 24x24 .*it takes 32 and more; choose another student"),
        ("torchvision:alexnet", 32, "too small.*it takes 64 and more"),
        ("torchvision:vit_b_16", 32, "Expected 224 but got 32.*usual sizes it takes 224;"),
        ("timm:vit_tiny_patch16_224", 64, "doesn't match model .*usual sizes it takes 224;"),
    ],
)
def test_a_student_that_cannot_take_the_images(name: str, size: int, said: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=said) as raised:
        least_batch(name, 10, {}, (size, size))
    assert "\n" not in str(raised.value)


def test_options_that_name_a_size_are_the_size() -> None:
    pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8}
    name = "timm:vit_tiny_patch16_224"
    cohort = fastokd.Cohort((name, 1), 10, sharing="network", model_options=options)
    assert cohort.image_size == 32
    assert least_batch(name, 10, options, (32, 32)) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """21 images of 4x4, all that a ResNet-8 needs for maps of one place."""
    generator = np.random.default_rng(0)
    for split, count in (("train", COUNT // 3), ("val", 1)):
        for label in "abc":
            place = tmp_path / "data" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "data"


def small(name: str = "dml/resnet8/imagefolder", **changes: Any) -> Any:
    fields = {"students": 2, "image_size": 4, "crop_padding": 0, "epochs": 1}
    return fastokd.recipe(name, **{**fields, "lr": 1e-3, "batch_size": 10, **changes})


def test_a_last_batch_of_one_image_is_left_out(folder: Path, tmp_path: Path) -> None:
    run = fastokd.train(small(), out=tmp_path / "run", data_root=folder, accumulate=9, **QUICK)
    assert run.last["step"] == 2  # 10 and 10 of 21 images, each in 5 parts of 2


def test_parts_and_batches_of_one_image(folder: Path, tmp_path: Path) -> None:
    session = build(small(), RunOptions(data_root=folder, accumulate=10, **QUICK))
    assert session.learner.min_batch == 2
    assert [session.learner.parts_of(batch) for batch in (10, 5, 2)] == [5, 2, 1]
    with pytest.raises(UserError, match=r"batch_size is 1, but resnet8 normalises over .* least 2"):
        fastokd.train(small(batch_size=1), out=tmp_path / "run", data_root=folder, **QUICK)
    assert not (tmp_path / "run").exists()
    # 21 images in batches of 4 leave one.
    assert len(build(small(batch_size=4), RunOptions(data_root=folder, **QUICK)).stream) == 5
    larger = small(batch_size=4, image_size=32)
    assert len(build(larger, RunOptions(data_root=folder, **QUICK)).stream) == 6


def test_no_folder_is_made_for_a_student_that_cannot_take_the_images(
    folder: Path, tmp_path: Path
) -> None:
    for one, said in (
        (small("baseline/vgg16/imagefolder", students=1), "vgg16 can't take images of 4x4"),
        (small("ffsd/resnet8/imagefolder", students=3), "last map is 1 x 1: choose larger images"),
    ):
        with pytest.raises(UserError, match=said):
            fastokd.train(one, out=tmp_path / "run", data_root=folder, **QUICK)
        assert not (tmp_path / "run").exists()
        with pytest.raises(UserError, match=said):
            plan(one, "h100")


def test_ffsd_asks_for_maps_at_the_size_of_the_images() -> None:
    cohort = fastokd.Cohort(("resnet8", 3), 10, sharing="network", image_size=30)
    with pytest.raises(UserError, match=r"30 x 30, 15 x 15, 8 x 8: .* images of another size"):
        create_method("ffsd", cohort.shape)
