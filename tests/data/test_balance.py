"""Class counts: right in memory and on disk, and named where a split is imbalanced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import fastokd
from fastokd.cli import run_command
from fastokd.data import class_counts, load_dataset
from fastokd.data.balance import imbalanced, sentences
from fastokd.data.disk.prepare import prepare
from fastokd.data.held_out import listed
from fastokd.report.page import report


def write(root: Path, counts: dict[str, int], split: str) -> None:
    for level, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            picture = Image.new("RGB", (32, 32), (40 * level, index, 0))
            picture.save(root / split / name / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "data", {"ant": 9, "bee": 4, "cow": 5}, "train")
    write(tmp_path / "data", {"ant": 2, "bee": 1, "cow": 2}, "val")
    return tmp_path / "data"


def test_counts_are_the_files(root: Path) -> None:
    memory = load_dataset("imagefolder", root)
    assert class_counts(memory.train, 3).tolist() == [9, 4, 5]
    assert class_counts(memory.train, 5).tolist() == [9, 4, 5, 0, 0]
    prepare(root)
    disk = load_dataset("imagefolder", root, streamed=True, loader="torchvision")
    assert class_counts(disk.train, 3).tolist() == [9, 4, 5]
    # Of test, the largest class has exactly twice the smallest's images.
    assert imbalanced(disk) == imbalanced(memory) == {"train": [9, 4, 5]}


def test_balanced_sets_are_not_mentioned() -> None:
    assert "class_counts" not in listed(load_dataset("digits"))
    assert sentences({}) == []


def test_of_many_classes_the_ends_are_named() -> None:
    names = [f"c{index}" for index in range(12)]
    (said,) = sentences({"class_counts": {"names": names, "val": [*range(1000, 1012)]}})
    assert said == (
        "val's classes are imbalanced: c11 1,011, c10 1,010, c9 1,009, 6 others, c2 1,002, c1 1,001, "
        "c0 1,000 images"
    )


def test_a_run_its_evaluation_and_its_report_name_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "train's classes are imbalanced: ant 9, cow 5, bee 4 images"
    out = tmp_path / "run"
    fastokd.train("baseline/resnet8/imagefolder", epochs=1, batch_size=8, data_root=root, out=out)
    assert said in capsys.readouterr().out
    facts = json.loads((out / "data.json").read_bytes())
    assert facts["class_counts"] == {"names": ["ant", "bee", "cow"], "train": [9, 4, 5]}
    assert run_command(["evaluate", str(out)]) == 0
    assert said in capsys.readouterr().out
    page = report([out], tmp_path / "page.html").read_text()
    assert "imagefolder: train&#x27;s classes are imbalanced: ant 9" in page
