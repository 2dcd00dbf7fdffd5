"""One rule for what is in a folder of classes: in memory, streamed and prepared; links, hidden names,
empty folders, classes that aren't everywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from fastokd.data import load_dataset
from fastokd.data.disk.layout import find_layout
from fastokd.data.disk.prepare import prepare
from fastokd.errors import UserError
from tests.data.make import write_folder


def both_forms(root: Path) -> tuple[tuple[str, ...], dict[str, list[int]], str]:
    """Classes, labels of each split and the note of the set in memory, which equal the streamed."""
    prepare(root, quiet=True)
    memory = load_dataset("imagefolder", root)
    disk = load_dataset("imagefolder", root, streamed=True, loader="torchvision")
    assert memory.class_names == disk.class_names
    labels = {name: getattr(memory, name).labels_N.tolist() for name in ("train", "test")}
    assert labels == {name: getattr(disk, name).labels_N.tolist() for name in ("train", "test")}
    return memory.class_names, labels, memory.note


def link(path: Path, target: str | Path) -> None:
    path.symlink_to(target)


@pytest.mark.parametrize(
    "lead_back",
    [
        lambda root: link(root / "train/cat/again", "."),
        lambda root: (link(root / "train/cat/x", "."), link(root / "train/cat/y", ".")),
        lambda root: link(root / "train/cat/up", ".."),
        lambda root: link(root / "train/cat/top", root),
        lambda root: link(root / "train/cat/all", "/"),
        lambda root: link(root / "train/cat/sibling", "../dog"),
        lambda root: link(root / "train/cow", "cat"),
        lambda root: (
            link(root / "train/cat/sibling", "../dog"),
            link(root / "train/dog/sibling", "../cat"),
        ),
        lambda root: link(root / "train/self", "self"),
    ],
)
def test_a_link_that_leads_back_adds_nothing(
    tmp_path: Path, lead_back: Callable[[Path], object]
) -> None:
    root = write_folder(tmp_path / "set")
    expected = find_layout(root).files
    lead_back(root)
    assert find_layout(root).files == expected
    classes, labels, note = both_forms(root)
    assert classes == ("cat", "dog")
    assert labels == {"train": [0] * 4 + [1] * 4, "test": [0] * 4 + [1] * 4}
    assert "link" in note


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Subsets are built of links: to files, to folders, to whole classes and splits."""
    pool = write_folder(tmp_path / "pool", splits=("all",), classes=("a", "b", "c"))
    root = tmp_path / "set"
    (root / "train/a").mkdir(parents=True)
    for index in range(3):
        link(root / f"train/a/{index}.png", pool / f"all/a/{index}.png")
    # The same file by another name counts, as in torchvision.
    link(root / "train/a/again.png", "0.png")
    link(root / "train/b", pool / "all/b")
    (root / "train/c").mkdir()
    link(root / "train/c/first", pool / "all/c")
    link(root / "train/c/second", pool / "all/c")
    link(root / "val", "train")
    classes, labels, note = both_forms(root)
    assert classes == ("a", "b", "c")
    assert labels["train"] == labels["test"] == [0] * 4 + [1] * 4 + [2] * 4
    assert "train/c/second is a link to a folder that is read already" in note
    # What lies in a class's folder isn't taken by a link in another's, whichever is read first.
    (root / "train/b").unlink()
    shutil.copytree(pool / "all/b", root / "train/b/deep")
    link(root / "train/a/theirs", "../b/deep")
    assert both_forms(root)[1]["train"] == labels["train"]
    # A class that is linked from within another is its own.
    shutil.move(root / "train/b/deep", tmp_path / "elsewhere/deep")
    (root / "train/b").rmdir()
    link(root / "train/b", tmp_path / "elsewhere/deep")
    (root / "train/a/theirs").unlink()
    link(root / "train/a/theirs", tmp_path / "elsewhere")
    assert both_forms(root)[1]["train"] == labels["train"]


def test_folders_within_a_class_are_read_in_torchvision_s_order(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    for inner in ("b", "a", "a/deep", "a-b", "cat", "Z"):
        (root / "train/cat" / inner).mkdir(exist_ok=True)
        shutil.copy(root / "train/cat/0.png", root / "train/cat" / inner / "0.png")
    layout = find_layout(root)
    theirs = [(str(Path(p).relative_to(root)), c) for p, c in ImageFolder(root / "train").samples]
    assert layout.usable("train") == theirs
    assert layout.notes == []
    # Of links to one folder the first in this order is followed.
    pool = write_folder(tmp_path / "pool", splits=("all",), classes=("x",))
    link(root / "train/cat/a/2", pool / "all/x")
    link(root / "train/cat/b/1", pool / "all/x")
    layout = find_layout(root)
    assert ("train/cat/a/2/0.png", 0) in layout.usable("train")
    (note,) = layout.notes
    assert note.startswith("train/cat/b/1 is a link to a folder that is read already")


def test_hidden_names_are_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    expected = find_layout(root).files
    image = root / "train/cat/0.png"
    for place in ("train", "val", "train/cat", "val/dog"):
        for name in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found"):
            (root / place / name).mkdir()
            shutil.copy(image, root / place / name / "seen.png")
        shutil.copy(image, root / place / "._0.png")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (root / place / name).write_bytes(b"x")
    assert find_layout(root).files == expected
    _, labels, note = both_forms(root)
    assert labels == {"train": [0] * 4 + [1] * 4, "test": [0] * 4 + [1] * 4}
    assert "train/.git is hidden: it is left out" in note
    assert note.endswith("more such notes")


def test_classes_that_val_lacks_and_empty_ones(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", classes=("a", "b", "c", "d"))
    shutil.rmtree(root / "val/d")
    for image in (root / "val/c").iterdir():
        image.unlink()
    (root / "train/b2").mkdir()
    (root / "val/zzz").mkdir()
    classes, labels, note = both_forms(root)
    assert classes == ("a", "b", "c", "d")
    assert labels["test"] == [0] * 4 + [1] * 4
    assert "val/ has no image of 2 of 4 classes (the first: c)" in note
    assert "train/b2 holds no image: it is no class" in note
    assert "val/zzz holds no image" in note
    # One that train lacks can't be tested.
    shutil.copy(root / "train/a/0.png", root / "val/zzz/0.png")
    for form in (prepare, lambda root, quiet: load_dataset("imagefolder", root)):
        with pytest.raises(UserError, match="has a class 'zzz' that train/ lacks"):
            form(root, quiet=True)


def test_what_can_t_be_an_image_is_named(tmp_path: Path) -> None:
    """A broken link; a pipe, whose reader would wait for ever; a class of them."""
    root = write_folder(tmp_path / "set")
    link(root / "train/cat/gone.png", "nowhere.png")
    os.mkfifo(root / "train/cat/pipe.png")
    link(root / "val/dog/lost", "nowhere")
    manifest = prepare(root, quiet=True).manifest
    faults = {entry.path: entry.fault for entry in manifest.quarantined()}
    assert faults == {
        "train/cat/gone.png": "a link that leads nowhere",
        "train/cat/pipe.png": "no regular file",
    }
    _, labels, note = both_forms(root)
    assert labels["train"] == [0] * 4 + [1] * 4
    assert (
        "2 of 18 files are quarantined and not read (the first: train/cat/gone.png, a link" in note
    )
    assert "val/dog/lost is a link that leads nowhere" in note
    for image in (root / "train/cat").glob("[0-9].png"):
        image.unlink()
    for form in (prepare, lambda root, quiet: load_dataset("imagefolder", root)):
        with pytest.raises(UserError, match=r"none of the images in .*train/cat can be used"):
            form(root, quiet=True)


def test_classes_are_sorted_by_code_point(tmp_path: Path) -> None:
    """As torchvision's: capitals first."""
    root = write_folder(tmp_path, classes=("a", "B", "ä", "_c"))
    classes, labels, _ = both_forms(root)
    assert list(classes) == ImageFolder(root / "train").classes == ["B", "_c", "a", "ä"]
    assert labels["test"] == ImageFolder(root / "val").targets
