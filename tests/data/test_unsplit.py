"""Folders without val/ and test/: how they are split, that both forms and a run keep the split, and what
a folder of classes may hold besides."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd import cli
from fastokd.data import DatasetSplits, load_dataset
from fastokd.data.disk.layout import find_layout
from fastokd.data.disk.prepare import prepare
from fastokd.data.held_out import draw
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.identity import other_recipe
from tests.data.make import write_cifar, write_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 cats, 10 dogs and 3 cows, a folder each."""
    root = tmp_path / "set"
    for name, count in (("cat", 20), ("dog", 10), ("cow", 3)):
        write_folder(root, splits=(".",), classes=(name,), count=count, size=(8, 8), seed=count)
    return root


def files(splits: DatasetSplits) -> dict[str, list[str]]:
    """The paths of each split."""
    found = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {
        name: [] if split is None or split.paths_N is None else [p.decode() for p in split.paths_N]
        for name, split in found.items()
    }


def train_on(root: Path) -> list[str]:
    """A command that trains on ``root``."""
    command = (
        f"train baseline/resnet8/imagefolder --data-root {root} --image-size 32 --batch-size 8"
    )
    return [*command.split(), "--epochs", "2", "--engine", "loop", "--device", "cpu"]


def in_each_class(paths: list[str]) -> dict[str, int]:
    return dict(Counter(path.split("/")[-2] for path in paths))


def in_both_forms(root: Path, **options: Any) -> DatasetSplits:
    """The set in memory, whose splits equal those of the streamed set."""
    prepare(root, quiet=True)
    options = {"image_size": 8, **options}
    memory = load_dataset("imagefolder", root, **options)
    disk = load_dataset("imagefolder", root, streamed=True, loader="torchvision", **options)
    assert files(memory) == files(disk)
    for ours, theirs in ((memory.train, disk.train), (memory.test, disk.test)):
        assert torch.equal(ours.labels_N, theirs.labels_N)
    assert memory.mean == pytest.approx(disk.mean)
    assert memory.note.split("\n")[0] == disk.note.split("\n")[0]
    return memory


def test_an_unsplit_folder_has_a_tenth_of_each_class_to_validate_and_to_test(root: Path) -> None:
    splits = in_both_forms(root)
    found = files(splits)
    assert splits.class_names == ("cat", "cow", "dog")
    assert (
        in_each_class(found["val"])
        == in_each_class(found["test"])
        == {"cat": 2, "cow": 1, "dog": 1}
    )
    assert in_each_class(found["train"]) == {"cat": 16, "cow": 1, "dog": 8}
    assert len({path for paths in found.values() for path in paths}) == 33
    assert splits.note.startswith(
        "no val/ or test/ folder: images are split per class by a fixed seed, 25 to train, 4 to "
        "validate (--val 0.1), 4 to test (--test 0.1)"
    )
    assert splits.held_out == {"test": 0.1, "val": 0.1}


@pytest.mark.parametrize(
    ("asked", "val", "test"),
    [
        ({"val": 0.2}, 7, 4),
        ({"test": 0.25}, 4, 9),
        ({"val": 5, "test": 6}, 5, 6),
        ({"val": 5}, 5, 4),
    ],
)
def test_the_shares_are_asked_for(root: Path, asked: dict[str, Any], val: int, test: int) -> None:
    found = files(in_both_forms(root, **asked))
    assert {name: len(paths) for name, paths in found.items()} == {
        "train": 33 - val - test,
        "val": val,
        "test": test,
    }


@pytest.mark.parametrize("asked", [{}, {"val": 6}])
def test_a_lone_train_is_split_too(root: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(root, alone / "train")
    assert files(in_both_forms(alone, **asked)) == {
        name: [f"train/{path}" for path in paths]
        for name, paths in files(in_both_forms(root, **asked)).items()
    }


def test_a_test_split_is_drawn_beside_val(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", count=10, size=(8, 8))
    splits = in_both_forms(root, test=0.2)
    assert splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 20, 4)
    assert "val/ is used as the test set" not in splits.note
    tested = write_folder(tmp_path / "tested", splits=("train", "test"), count=10, size=(8, 8))
    with pytest.raises(
        UserError, match=r"test is 0\.2, but imagefolder comes with 20 images to test"
    ):
        load_dataset("imagefolder", tested, test=0.2)
    splits = in_both_forms(tested, val=0.2)
    assert splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 20)


def test_a_fraction_of_a_set_in_memory(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", train=100, test=20)
    splits = load_dataset("cifar10", tmp_path, val=0.2)
    assert splits.val is not None
    assert torch.bincount(splits.val.labels_N).tolist() == [2] * 10
    assert splits.note == ""
    with pytest.raises(UserError, match=r"test is 0\.2, but cifar10 comes with 20 images to test"):
        load_dataset("cifar10", tmp_path, test=0.2)


def test_every_class_keeps_an_image_to_train_on() -> None:
    labels_N = torch.tensor([0] * 50 + [1] * 2 + [2])
    with pytest.raises(UserError, match=r"leaves no image of class 'c' .*\(it has 1 image\)"):
        draw(labels_N, {"val": 0.1}, ("a", "b", "c"))
    with pytest.raises(UserError, match=r"test 0.1 and val 0.1 .* class 'b' .*\(it has 2 images\)"):
        draw(labels_N[:-1], {"test": 0.1, "val": 0.1}, ("a", "b"))
    parts = draw(labels_N[:-1], {"val": 0.1}, ("a", "b"))
    assert labels_N[parts["val"]].bincount().tolist() == [5, 1]
    assert labels_N[parts["train"]].bincount().tolist() == [45, 1]


def test_a_class_may_be_called_train(root: Path) -> None:
    (root / "cat").rename(root / "train")
    splits = in_both_forms(root)
    assert splits.class_names == ("cow", "dog", "train")
    assert in_each_class(files(splits)["test"]) == {"train": 2, "cow": 1, "dog": 1}


def test_what_lies_beside_the_images_is_left_out(root: Path) -> None:
    expected = files(load_dataset("imagefolder", root))
    for name in (".DS_Store", "cat/.DS_Store", "dog/Thumbs.db", "readme.txt"):
        (root / name).write_bytes(b"x")
    shutil.copytree(root / "cat", root / ".git")
    shutil.copytree(root / "cat", root / "__MACOSX")
    (root / "cow/notes.txt").write_text("x")
    (root / "empty").mkdir()
    shutil.copytree(root / "cat", root / "runs/first")
    (root / "runs/first/recipe.json").write_text("{}")
    splits = load_dataset("imagefolder", root)
    assert splits.class_names == ("cat", "cow", "dog")
    assert files(splits) == expected
    notes = find_layout(root).notes
    assert "empty holds no image: it is no class" in notes
    assert "runs holds runs of fastokd: it is left out" in notes
    # An image without a class is named, those in folders within a class and in capitals are read.
    (root / "cat/0.png").rename(root / "stray.png")
    (root / "dog/deep").mkdir()
    (root / "dog/1.png").rename(root / "dog/deep/1.PNG")
    shutil.copy(root / "dog/2.png", root / "dog/deep/2.png")  # the same name twice
    splits = in_both_forms(root)
    assert splits.left_out == (("stray.png", "in no class's folder"),)
    everything = [path for paths in files(splits).values() for path in paths]
    assert {"dog/deep/1.PNG", "dog/deep/2.png", "dog/2.png"} <= {*everything}


def test_a_folder_one_too_deep_is_named(root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / "inner")
    (root / "labels").mkdir(parents=True)
    (tmp_path / "inner").rename(root / "photos")
    with pytest.raises(
        UserError, match=r"has 1 folder .*; is .*/photos the folder that you mean\?"
    ):
        load_dataset("imagefolder", root)


@pytest.mark.parametrize("form", ["memory", "streamed"])
def test_a_run_keeps_its_split(
    form: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are added change nothing for it; one that is gone is named."""
    command = " ".join([*train_on(root), "--out", str(tmp_path / "run")])
    if form == "streamed":
        prepare(root, quiet=True)
        command += " --set resized_crop=true --set crop_padding=0 --loader torchvision"
    assert cli.run_command([*command.split(), "--max-steps", "2"]) == 0
    kept = json.loads((tmp_path / "run/data.json").read_text())
    assert {n: len(kept[n]) for n in ("train", "val", "test")} == {"train": 25, "val": 4, "test": 4}
    evaluate = ["evaluate", str(tmp_path / "run"), "--data-root", str(root), "--json"]
    capsys.readouterr()
    assert cli.run_command(evaluate) == 0
    before = json.loads(capsys.readouterr().out)
    for index in range(9):
        shutil.copy(root / "dog/0.png", root / "dog" / f"0{index}.png")
    if form == "streamed":
        prepare(root, quiet=True)
    assert files(load_dataset("imagefolder", root)) != {
        n: kept[n] for n in ("train", "val", "test")
    }
    assert cli.run_command(evaluate) == 0
    assert json.loads(capsys.readouterr().out) == before
    assert cli.run_command([*command.split(), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "9 files were added since the run began and aren't used" in said
    assert "25 to train, 4 to validate" in said
    assert json.loads((tmp_path / "run/data.json").read_text()) == kept
    (root / kept["val"][0]).unlink()
    if form == "streamed":
        prepare(root, quiet=True)
    assert cli.run_command(evaluate) == 2
    assert f"(the first: {kept['val'][0]}): put them back" in capsys.readouterr().err


def test_a_file_that_is_damaged_after_the_run_is_no_smaller_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a split folder a run keeps no lists; what was left out at the beginning stays so."""
    root, run = tmp_path / "set", str(tmp_path / "run")
    write_folder(root, splits=("train", "test"), count=12)
    (root / "test/cat/0.png").write_bytes(b"no image")
    assert cli.run_command([*train_on(root), "--max-steps", "1", "--out", run]) == 0
    assert cli.run_command(["evaluate", run]) == 0
    (root / "test/cat/1.png").write_bytes(b"no image")
    for command in (["evaluate", run], ["train", "--resume", run]):
        capsys.readouterr()
        assert cli.run_command(command) == 2
        said = capsys.readouterr().err
        assert "the run didn't leave them out when it began (the first: test/cat/1.png" in said


def test_weights_that_saw_held_out_files_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shares are equal, but files were added to the folder in between."""
    first = str(tmp_path / "first")
    assert cli.run_command([*train_on(root), "--max-steps", "1", "--out", first]) == 0
    begin = [*train_on(root), "--max-steps", "1", "--init", first, "--out"]
    assert cli.run_command([*begin, str(tmp_path / "second")]) == 0
    for name in ("cat", "dog"):
        for index in range(3):
            shutil.copy(root / name / "0.png", root / name / f"0{index}.png")
    capsys.readouterr()
    assert cli.run_command([*begin, str(tmp_path / "third")]) == 2
    assert re.search(
        r"was trained on \d of the \d+ images that are held out", capsys.readouterr().err
    )


def test_a_recipe_takes_numbers_and_fractions() -> None:
    name = "baseline/resnet8/imagefolder"
    assert recipe(name, val=100.0).to_json()["val"] == 100
    assert type(recipe(name, val=100.0).val) is int
    made = recipe(name, val=0.1, test=0.25)
    assert (made.val, made.test) == (0.1, 0.25)
    assert type(made).from_json(made.to_json()) == made
    earlier = {key: value for key, value in made.to_json().items() if key != "test"}
    assert type(made).from_json(earlier).test == 0
    before = {k: v for k, v in recipe(name).to_json().items() if k != "test"}
    assert other_recipe(recipe(name), before) == []
    assert other_recipe(made, before) == ["val (0 there, 0.1 here)", "test (0 there, 0.25 here)"]
    for wrong in (1.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="must be a whole number of images"):
            recipe(name, val=wrong)
