"""A picture file is shown to ``predict`` as the same picture is to validation, for every set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from fastokd.data import DatasetSplits, DiskSplit, load_dataset, read_all
from fastokd.data.decode import centre
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import photographs, write_photographs
from fastokd.data.preprocessing import KNOWN, Preprocessing, preprocessing_of
from fastokd.data.sets.digits import digits_indices, digits_pixels
from fastokd.data.views import View
from fastokd.device import autocast
from fastokd.errors import UserError
from fastokd.evaluate import Scorer, evaluation_stream
from fastokd.export.hub import _shown_by_timm
from fastokd.learner.build import build_cohort
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights
from fastokd.student.predict import predict
from fastokd.student.teacher import build_teacher
from fastokd.student.weights import student_facts
from tests.data.loaders import LOADERS, alike
from tests.data.make import write_cifar, write_fashion_mnist

CPU = torch.device("cpu")


def scored(of: Recipe, data: DatasetSplits, file: Path) -> tuple[Tensor, float]:
    """A student's file, its cohort's probabilities on the test split, and the accuracy there."""
    cohort, method = build_cohort(
        of, len(data.class_names), image_size=data.train.image_size[0], mean=data.mean, std=data.std
    )
    save_file(
        cohort.student_state(0), file, student_facts(of, data.class_names, data.preprocessing, 0)
    )
    stream = evaluation_stream(data.test)
    found = Scorer(cohort, method, False, lambda: autocast(CPU, "fp32")).measure(stream)
    with torch.no_grad():
        logits = [cohort.eval()(images).logits_SBC[0] for images, _ in stream.batches(0)]
    return torch.cat(logits).softmax(1), found["student_top1"][0]


def predicted(student: Path, files: list[Path], C: int) -> Tensor:
    """``predict``'s probabilities in the classes' order."""
    names = read_weights(student).fact("class_names")
    rows = []
    for prediction in predict(student, files, top=C):
        said = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        rows.append([said[name] for name in names])
    return torch.tensor(rows)


def assert_the_same(of: Recipe, data: DatasetSplits, files: list[Path], folder: Path) -> None:
    wanted_BC, top1 = scored(of, data, folder / "student.safetensors")
    got_BC = predicted(folder / "student.safetensors", files, data.num_classes)
    torch.testing.assert_close(got_BC, wanted_BC, atol=1e-6, rtol=1e-4)
    right = got_BC.argmax(1) == data.test.labels_N[: len(files)]
    assert right.double().mean().item() == pytest.approx(top1)


def first(data: DatasetSplits, count: int) -> DatasetSplits:
    return dataclasses.replace(data, test=data.test.select(torch.arange(count)))


def save(pixels: np.ndarray, path: Path) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.usefixtures("all_digits")
@pytest.mark.parametrize("to_level", [np.round, np.floor])
def test_digits_of_eight_pixels(to_level: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """scikit-learn's 0 to 16 as levels of 0 to 255, however they are rounded."""
    data = first(load_dataset("digits"), 40)
    pixels_NHW = digits_pixels()[0][digits_indices()["test"][:40]].numpy()
    files = [
        save(to_level(pixels_HW * 255 / 16).astype(np.uint8), tmp_path / f"{i}.png")
        for i, pixels_HW in enumerate(pixels_NHW)
    ]
    assert_shown(data, files)
    assert_the_same(recipe("baseline/resnet8/digits"), data, files, tmp_path)


def test_fashion_mnist_of_28_pixels(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, train=12, test=12)
    data = load_dataset("fashion_mnist", tmp_path)
    files = [
        save(image[2:30, 2:30, 0], tmp_path / f"{i}.png")
        for i, image in enumerate(read_all(data.test)[0].numpy())
    ]
    assert_shown(data, files)
    assert_the_same(recipe("baseline/resnet8/fashion_mnist"), data, files, tmp_path)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "cifar100"])
def test_what_the_network_sees_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    if name == "fashion_mnist":
        write_fashion_mnist(tmp_path, train=12, test=12)
    elif name != "digits":
        write_cifar(tmp_path, name, train=12, test=12)
    data = first(load_dataset(name, tmp_path), 12)
    files = [
        save(image, tmp_path / f"{i}.png") for i, image in enumerate(read_all(data.test)[0].numpy())
    ]
    assert_shown(data, files)
    assert_the_same(recipe(f"baseline/resnet8/{name}"), data, files, tmp_path)


def test_a_picture_whose_centre_is_of_the_network_s_size_is_cropped(tmp_path: Path) -> None:
    """Not brought to eight pixels and back."""
    pixels_HW = np.random.default_rng(0).integers(256, size=(32, 44), dtype=np.uint8)
    shown = KNOWN["digits"].read(save(pixels_HW, tmp_path / "wide.png"))
    assert np.array_equal(shown, np.repeat(pixels_HW[:, 6:38, None], 3, 2))


def assert_shown(data: DatasetSplits, files: list[Path]) -> None:
    """Pixel for pixel."""
    shown = np.stack([data.preprocessing.read(file) for file in files])
    assert np.array_equal(shown, read_all(data.test)[0].numpy())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several proportions, prepared."""
    root = tmp_path_factory.mktemp("photos")
    write_photographs(root, classes=2, train=3, val=6, size=(150, 112))
    prepare(root, quiet=True)
    return root


@pytest.mark.parametrize("eval_resize", [0, 40])
@pytest.mark.parametrize("loader", ["memory", *LOADERS])
def test_a_folder_in_memory_and_streamed(
    loader: str, eval_resize: int, photos: Path, tmp_path: Path
) -> None:
    streamed: Any = {"resized_crop": True, "crop_padding": 0} if loader != "memory" else {}
    of = recipe("baseline/resnet8/imagefolder", eval_resize=eval_resize, **streamed)
    chosen: Any = {} if loader == "memory" else {"loader": loader, "workers": 1}
    data = load_splits(of, RunOptions(data_root=photos, **chosen))
    assert data.loader == loader
    assert data.preprocessing.view == View(32, eval_resize)
    files = sorted((photos / "val").rglob("*.JPEG"))
    if loader in ("memory", "torchvision"):
        assert_shown(data, files)
        assert_the_same(of, data, files, tmp_path)
        return
    for file, theirs in zip(files, read_all(data.test)[0].numpy(), strict=True):
        assert alike(loader, data.preprocessing.read(file), theirs), file


def test_held_out_images_in_memory_are_cropped(photos: Path) -> None:
    """The margin of a centre crop is seen by neither validation nor a student in training."""
    whole, cropped = (
        load_dataset("imagefolder", photos, image_size=32, eval_resize=resize, val=2)
        for resize in (0, 64)
    )
    for split in ("train", "val", "test"):
        a, b = (getattr(data, split).images_NHWC for data in (whole, cropped))
        assert a.shape == b.shape
        assert not torch.equal(a, b)


def test_imagenet_is_tested_on_the_centre_of_256(photos: Path, tmp_path: Path) -> None:
    """From the recipe to the loader and to the student's file."""
    of = recipe("baseline/resnet18/imagenet")
    data = load_splits(of, RunOptions(data_root=photos, loader="torchvision"))
    assert isinstance(data.test, DiskSplit)
    assert data.test.view == View(224, 256)
    facts = student_facts(of, data.class_names, data.preprocessing, 0)
    assert (facts["input_size"], facts["eval_resize"]) == ("224", "256")
    save_file({"x": torch.zeros(1)}, tmp_path / "s.safetensors", facts)
    assert read_weights(tmp_path / "s.safetensors").preprocessing == data.preprocessing


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_file_says_is_read_back(name: str, tmp_path: Path) -> None:
    shown = dataclasses.replace(KNOWN[name], mean=(0.1, 0.2, 0.3), background=7)
    file = tmp_path / "s.safetensors"
    save_file({"x": torch.zeros(1)}, file, shown.to_facts())
    assert read_weights(file).preprocessing == shown


OLD = ("mean", "std", "input_size", "eval_resize")


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("left", [OLD, ("mean", "std")])
def test_files_of_earlier_versions_mean_their_set(
    name: str, left: tuple[str, ...], tmp_path: Path
) -> None:
    """By its mean and deviation; of a folder they say nothing, so that it must say its size."""
    facts = {key: value for key, value in KNOWN[name].to_facts().items() if key in left}
    if name == "imagefolder":
        facts["mean"] = "[0.2, 0.3, 0.4]"
    file = tmp_path / "s.safetensors"
    save_file({"x": torch.zeros(1)}, file, facts)
    if name == "imagefolder" and left != OLD:
        with pytest.raises(UserError, match="doesn't say its input_size"):
            _ = read_weights(file).preprocessing
        return
    expected = dataclasses.replace(KNOWN[name], mean=tuple(json.loads(facts["mean"])))
    assert read_weights(file).preprocessing == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("native_size", "-1"), ("border", "1"), ("levels", "1"), ("background", "256"), ("grey", "{")],
)
def test_a_damaged_fact_is_named(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    save_file({"x": torch.zeros(1)}, file, {**KNOWN["digits"].to_facts(), name: value})
    with pytest.raises(UserError, match=f"its {name}"):
        _ = read_weights(file).preprocessing


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grey": True}, "images whose grey is True, and imagefolder's is False"),
    ],
)
def test_a_teacher_of_other_images_is_refused(
    change: dict[str, Any], says: str, photos: Path, tmp_path: Path
) -> None:
    of = recipe("baseline/resnet8/imagefolder")
    data = load_splits(of, RunOptions(data_root=photos))
    file = tmp_path / "teacher.safetensors"
    scored(of, data, file)
    build_teacher(read_weights(file), data)
    other = dataclasses.replace(data.preprocessing, **change)
    save_file(read_weights(file).state, file, student_facts(of, data.class_names, other, 0))
    with pytest.raises(UserError, match=says):
        build_teacher(read_weights(file), data)


@pytest.mark.parametrize("sizes", [(32, 0), (32, 40), (224, 256), (64, 73), (33, 47), (160, 183)])
def test_timm_shows_a_picture_alike(sizes: tuple[int, int]) -> None:
    """By the configuration of a hub's folder, and in words beside it."""
    size, resize = sizes
    shown = preprocessing_of("imagefolder", image_size=size, eval_resize=resize)
    config = resolve_data_config({}, pretrained_cfg=_shown_by_timm(shown))
    photo = photographs()[0]
    theirs = create_transform(**config, is_training=False)(photo)
    ours = shown.normalized(torch.tensor(centre(photo, shown.view))[None])[0]
    assert (theirs - ours).abs().max().item() < 3 / 255 / 0.25
    assert f"shorter side is resized to {resize or size}" in shown.sentence()


def test_the_words_of_small_grey_pictures() -> None:
    digits, fashion = (KNOWN[name].sentence() for name in ("digits", "fashion_mnist"))
    assert "resized to 8 x 8 and enlarged by bicubic interpolation to 32 x 32" in digits
    assert "resized to 28 x 28 and padded with black to 32 x 32" in fashion
    assert "filled with black" in fashion
    assert "filled with white" in Preprocessing(32, (0.5,) * 3, (0.5,) * 3).sentence()
