"""Files, folders and patterns are classified, in batches, and what can't be read is said."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.cli import run_command
from fastokd.data.preprocessing import preprocessing_of
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.result import Run
from fastokd.student.predict import predict
from tests.student.test_export import student_file

# Sorted by path: a folder's own files come before and after its subfolders' by name.
NAMES = ["a.jpg", "b/c.PNG", "b/d/e.jpg", "f.jpg"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_file(tmp_path_factory.mktemp("student") / "s.safetensors", "resnet8", 32)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of several sizes in subfolders, and files that aren't pictures."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for index, name in enumerate((*NAMES, ".hidden.jpg")):
        path = Path("pictures") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 255, (40 + index, 50, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)
    Path("pictures/notes.txt").write_text("no picture")
    Path("pictures/b/again").symlink_to("..")
    return Path("pictures")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["pictures"], NAMES),
        (["pictures/"], NAMES),
        (["pictures/*.jpg"], ["a.jpg", "f.jpg"]),
        (["pictures/**/*.jpg"], ["a.jpg", "b/d/e.jpg", "f.jpg"]),
        (["pictures/**"], NAMES),
        (["pictures/b*"], ["b/c.PNG", "b/d/e.jpg"]),
        (["pictures/f.jpg", "pictures/a.jpg"], ["f.jpg", "a.jpg"]),
        (["pictures/f.jpg", "pictures/b"], ["f.jpg", "b/c.PNG", "b/d/e.jpg"]),
    ],
)
def test_files_folders_and_patterns_in_order(
    given: list[str], names: list[str], student: Path, pictures: Path
) -> None:
    (pictures / "b/again").unlink()  # `**` follows links
    found = [str(row.image.relative_to("pictures")) for row in predict(student, given, top=1)]
    assert found == names


def test_a_folder_is_walked_once(student: Path, pictures: Path) -> None:
    assert len(predict(student, pictures)) == len(NAMES)


def test_a_file_whose_name_is_a_pattern_is_itself(student: Path, pictures: Path) -> None:
    (pictures / "a.jpg").rename(pictures / "[f].jpg")
    assert [row.image for row in predict(student, "pictures/[f].jpg")] == [pictures / "[f].jpg"]


def test_the_batch_changes_nothing(student: Path, pictures: Path) -> None:
    """Ten classes of each picture, alone, in batches with a rest, and all together."""
    alone, some, all_ = (predict(student, pictures, top=10, batch_size=n) for n in (1, 3, 64))
    for rows in zip(alone, some, all_, strict=True):
        assert len({row.image for row in rows}) == 1
        first = dict(zip(rows[0].classes, rows[0].probabilities, strict=True))
        assert len(first) == 10
        for row in rows[1:]:
            own = dict(zip(row.classes, row.probabilities, strict=True))
            assert own == pytest.approx(first, abs=1e-5)


def test_a_run_is_taken_as_its_folder_is(student: Path, pictures: Path, tmp_path: Path) -> None:
    """Strings, paths and a Run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "student.safetensors").write_bytes(student.read_bytes())
    wanted = predict(folder, pictures)
    assert predict(str(folder), str(pictures)) == wanted
    assert predict(Run(folder, recipe("baseline/resnet8/digits"), []), [str(pictures)]) == wanted
    with pytest.raises(UserError, match=r"student must be a path \(got 7\)"):
        predict(7, pictures)


def test_damaged_pictures_are_left_out_and_said(
    student: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are classified, in their order, and the exit code is 2."""
    wanted = [str(row.image) for row in predict(student, pictures)]
    (pictures / "b/broken.jpg").write_text("no picture")
    (pictures / "z.jpg").symlink_to("nowhere.jpg")
    assert run_command(["predict", str(student), "pictures", "--json", "--batch-size", "2"]) == 2
    printed = capsys.readouterr()
    assert [row["image"] for row in json.loads(printed.out)] == wanted
    first, second, last = printed.err.splitlines()
    assert first.startswith("pictures/b/broken.jpg can't be read as an image")
    assert second.startswith("pictures/z.jpg can't be read as an image")
    assert last.startswith("fastokd: 2 of 6 pictures can't be read")
    with pytest.raises(UserError, match=r"broken\.jpg can't be read"):
        predict(student, pictures)
    assert [str(row.image) for row in predict(student, pictures, skip_damaged=True)] == wanted
    assert capsys.readouterr().err.count("warning: ") == 2


def test_a_table(student: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "f.jpg").rename(pictures / 'f, "é"\r.jpg')
    command = ["predict", str(student), "pictures", "--top", "2", "--csv", "found.csv"]
    for _ in range(2):  # the second replaces the first
        assert run_command(command) == 0
    assert capsys.readouterr().out.splitlines()[0] == "4 predictions written to found.csv"
    with open("found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = predict(student, pictures, top=2)
    assert [*rows[0]] == ["image", "class", "probability", "class_2", "probability_2"]
    assert [row["image"] for row in rows] == [str(row.image) for row in wanted]
    assert [(row["class"], row["class_2"]) for row in rows] == [row.classes for row in wanted]
    assert [float(row["probability"]) for row in rows] == [row.probabilities[0] for row in wanted]


def test_many_pictures_show_progress(
    student: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, so that standard output stays what it is."""
    command = ["predict", str(student), "--json"]
    assert run_command([*command, *["pictures/a.jpg"] * 20]) == 0
    printed = capsys.readouterr()
    assert "20/20" in printed.err
    assert len(json.loads(printed.out)) == 20
    assert run_command([*command, "pictures"]) == 0
    assert capsys.readouterr().err == ""


def test_the_preprocessing_is_of_the_file(student: Path, pictures: Path) -> None:
    """A rotated picture is classified as the upright one."""
    assert preprocessing_of("imagefolder").input_size == 32
    with Image.open("pictures/a.jpg") as image:
        image.save("upright.png")
        turned = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save("turned.png", exif=exif)
    upright, turned_back = predict(student, ["upright.png", "turned.png"])
    assert turned_back.probabilities == upright.probabilities


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_listed_is_said(student: Path, pictures: Path) -> None:
    (pictures / "b").chmod(0)
    try:
        with pytest.raises(UserError, match="can't list pictures/b"):
            predict(student, pictures)
    finally:
        (pictures / "b").chmod(0o755)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(student: Path, pictures: Path) -> None:
    """In float32, without TF32."""
    ours, theirs = (predict(student, pictures, top=10, device=name) for name in ("cpu", "cuda"))
    for a, b in zip(ours, theirs, strict=True):
        found = dict(zip(b.classes, b.probabilities, strict=True))
        assert dict(zip(a.classes, a.probabilities, strict=True)) == pytest.approx(found, abs=1e-4)
