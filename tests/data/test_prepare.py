"""``fastokd prepare``: every file is looked at, every fault is listed with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat
from torchvision.datasets import ImageFolder

from fastokd import cli
from fastokd.data import DiskSplit, load_dataset, read_all
from fastokd.data.disk.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import write_photographs
from fastokd.errors import UserError
from tests.data.loaders import LOADERS
from tests.data.make import write_folder

BAD = {
    "cut.JPEG": "can't be decoded: image file is truncated",
    "empty.JPEG": "empty",
    "text.JPEG": "no image",
    "gif.JPEG": "a GIF, which isn't read",
    "deep.png": "more than 8 bits a channel",
}
GOOD = ("grey.JPEG", "cmyk.JPEG", "png.JPEG", "palette.png", "alpha.png", "web.webp", "exif.JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; in the first, one file of every kind."""
    root = write_photographs(tmp_path / "set", classes=2, train=4, val=2, size=(60, 45))
    folder = root / "train" / "n00000000"
    image = Image.open(next(folder.iterdir()))
    whole = next(folder.iterdir()).read_bytes()
    image.convert("L").save(folder / "grey.JPEG")
    image.convert("CMYK").save(folder / "cmyk.JPEG")
    image.save(folder / "png.JPEG", "PNG")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.save(folder / "web.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "exif.JPEG", exif=exif)
    for split in ("train", "val"):  # whose colours are counted, and whose aren't
        (root / split / folder.name / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.JPEG").write_bytes(b"")
    (folder / "text.JPEG").write_text("not an image")
    image.save(folder / "gif.JPEG", "GIF")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")
    return root


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_fault_is_listed_and_all_else_is_read(root: Path, loader: str, workers: int) -> None:
    done = prepare(root, workers=workers, quiet=True)
    folder = "train/n00000000/"
    faults = {entry.path: entry.fault for entry in done.manifest.quarantined()}
    assert faults.pop("val/n00000000/cut.JPEG").startswith(BAD["cut.JPEG"])
    assert set(faults) == {folder + name for name in BAD}
    for name, fault in BAD.items():
        assert faults[folder + name].startswith(fault), name
        assert any(f"{folder}{name}: {fault}" in line for line in done.lines()), name
    assert read_manifest(root) == done.manifest
    splits = load_dataset("imagenet", root, image_size=32, eval_resize=37, loader=loader)
    assert isinstance(splits.train, DiskSplit)
    assert "6 of 25 files are quarantined" in splits.note
    names = {splits.train.path(i).name for i in range(len(splits.train))}
    assert set(GOOD) <= names
    assert not set(BAD) & names
    assert read_all(splits.train)[0].shape == (15, 32, 32, 3)


def test_order_sizes_and_colours_are_those_of_torchvision(root: Path) -> None:
    """But that a photograph is turned as its camera says."""
    for name in BAD:
        (root / "train" / "n00000000" / name).unlink()
    (root / "val" / "n00000000" / "cut.JPEG").unlink()
    manifest = prepare(root, quiet=True).manifest
    theirs = ImageFolder(root / "train")
    entries = manifest.usable("train")
    assert list(manifest.classes) == theirs.classes
    assert [(str(root / e.path), e.label) for e in entries] == theirs.samples
    pixels = [np.asarray(image).reshape(-1, 3) / 255 for image, _ in theirs]
    upright = [ImageOps.exif_transpose(Image.open(path)).size[::-1] for path, _ in theirs.samples]
    assert [(e.height, e.width) for e in entries] == upright
    assert upright != [image.size[::-1] for image, _ in theirs]
    assert manifest.mean == pytest.approx(np.concatenate(pixels).mean(0).tolist(), abs=1e-9)
    assert manifest.std == pytest.approx(np.concatenate(pixels).std(0).tolist(), abs=1e-9)


def test_folders_and_files_in_the_wrong_place(root: Path) -> None:
    """Beside the classes, in a class of another's, empty, hidden."""
    image = next((root / "train" / "n00000001").iterdir())
    inner, hidden = root / "train" / "n00000001" / "n00000000", root / "train" / ".thumbs"
    for folder in (inner, hidden, root / "train" / "n00000005", root / "val" / "n00000009"):
        folder.mkdir()
    for place in (root, root / "train", root / "val", inner, hidden):
        shutil.copy(image, place / "lost.JPEG")
    (root / "test").mkdir()
    shutil.copy(image, root / "test" / "unlabelled.JPEG")
    manifest = prepare(root, quiet=True).manifest
    assert manifest.classes == ("n00000000", "n00000001")
    lost = {e.path: e.fault for e in manifest.quarantined() if e.path.endswith("lost.JPEG")}
    assert lost == {
        "lost.JPEG": "outside train/ and val/",
        "train/lost.JPEG": "in no class's folder",
        "val/lost.JPEG": "in no class's folder",
        "train/n00000001/n00000000/lost.JPEG": (
            "in the folder of class n00000000 inside that of n00000001"
        ),
    }
    assert set(manifest.notes) == {
        "train/.thumbs is hidden: it is left out",
        "train/n00000005 holds no image: it is no class",
        "train/n00000001: holds a folder of class n00000000",
        "val/n00000009 holds no image: it is no class",
        "test/ has no folders of classes: it is left out",
    }


def flatten(root: Path) -> list[tuple[str, str]]:
    """``val/`` as ILSVRC ships it, its images in an order that mixes the classes."""
    (root / "val" / "n00000000" / "cut.JPEG").unlink()
    images = sorted((root / "val").rglob("*.JPEG"), key=lambda path: path.name[::-1])
    truth = []
    for number, image in enumerate(images, start=1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        truth.append((name, image.parent.name))
        image.rename(root / "val" / name)
    for folder in {image.parent for image in images}:
        folder.rmdir()
    return truth


def devkit(root: Path, truth: list[tuple[str, str]]) -> None:
    """Numbers that aren't in the order of the ids, as ILSVRC's aren't; 1001 is no leaf."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    numbers = {"n00000000": 2, "n00000001": 1}
    rows = [(1, "n00000001", 0), (2, "n00000000", 0), (1001, "n00000077", 2)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
    lines = "".join(f"{numbers[wordnet]}\n" for _, wordnet in truth)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def kaggle(root: Path, truth: list[tuple[str, str]]) -> None:
    rows = [f"{Path(name).stem},{label} 1 2 3 4 {label} 5 6 7 8" for name, label in truth[::-1]]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))


def pairs(root: Path, truth: list[tuple[str, str]]) -> None:
    """Caffe's: positions in the sorted ids."""
    (root / "val.txt").write_text("".join(f"{name} {int(label[1:])}\n" for name, label in truth))


@pytest.mark.parametrize("write", [devkit, kaggle, pairs])
def test_the_flat_val_of_ilsvrc(
    root: Path, write: Callable[[Path, list[tuple[str, str]]], None]
) -> None:
    truth = flatten(root)
    assert [label for _, label in truth] != sorted(label for _, label in truth)
    with pytest.raises(
        UserError, match=r"put ILSVRC2012_validation_ground_truth\.txt and meta\.mat"
    ):
        prepare(root, quiet=True)
    write(root, truth)
    manifest = prepare(root, imagenet=True, quiet=True).manifest
    found = [(Path(e.path).name, manifest.classes[e.label]) for e in manifest.usable("val")]
    assert found == truth
    assert "ImageNet has 1,000 classes, this folder 2" in manifest.notes


def test_a_ground_truth_that_doesn_t_fit_is_named(root: Path) -> None:
    truth = flatten(root)
    file = root / "truth.txt"

    def says(content: str, match: str) -> None:
        file.write_text(content)
        with pytest.raises(UserError, match=match):
            prepare(root, ground_truth=file, quiet=True)

    says("1\n1\n1\n1\n", r"numbers need .*meta\.mat")
    devkit(root, truth)
    shutil.copy(root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", root / "meta.mat")
    says("1\n2\n", "has 2 lines, but there is an image ILSVRC2012_val_00000003.JPEG")
    says("1\n2\n1\n9\n", "line 4 of .* is 9, which .* doesn't have")
    says("a b c\n", "line 1 of .* is 'a b c': write NAME CLASS")
    says("a 7\n", "names class 7, but train/ has 2")
    says("ImageId,PredictionString\nx\n", "line 2 of .* is 'x'")
    (root / "meta.mat").write_bytes(b"nothing")
    says("1\n2\n1\n2\n", "fetch the development kit again")
    file.write_text(f"{truth[0][0]} n00000000\n{truth[1][0]} n00000042\n")
    faults = {
        e.fault for e in prepare(root, ground_truth=file, quiet=True).manifest.quarantined("val")
    }
    assert faults == {"the ground truth doesn't name it", "train/ has no class n00000042"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: shutil.rmtree(root / "train"), "there is no folder .*train"),
        (lambda root: shutil.rmtree(root), "there is no folder .*set"),
        (lambda root: shutil.rmtree(root / "train" / "n00000001"), "needs at least 2"),
        (
            lambda root: [f.write_bytes(b"") for f in (root / "train" / "n00000001").iterdir()],
            r"none of the images in .*n00000001 can be used \(the first: empty\)",
        ),
    ],
)
def test_a_folder_that_can_t_be_trained_on_is_refused(
    root: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(root)
    with pytest.raises(UserError, match=says):
        prepare(root, quiet=True)


def test_imagenet_needs_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match="no images in val/: ImageNet is tested on them"):
        prepare(root, imagenet=True, quiet=True)


def test_a_folder_one_too_deep_is_found_out(root: Path) -> None:
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "train")
    with pytest.raises(UserError, match=r"is .*train/train the folder that you mean\?"):
        prepare(root, quiet=True)


def test_a_manifest_moves_with_its_folder_or_stands_apart(root: Path, tmp_path: Path) -> None:
    prepare(root, quiet=True)
    moved = root.rename(tmp_path / "moved")
    assert len(read_manifest(moved).usable("val")) == 4
    apart = tmp_path / "apart"
    prepare(moved, out=apart, quiet=True)
    splits = load_dataset("imagenet", apart, image_size=32, eval_resize=32, loader="torchvision")
    assert read_all(splits.test)[0].shape == (4, 32, 32, 3)
    with pytest.raises(UserError, match="give a folder for the manifest with --out"):
        prepare(moved, out=moved / MANIFEST, quiet=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "\n".join(text.split("\n")[:-3]) + "\n",
        lambda text: "",
        lambda text: "[]\n",
        lambda text: text.replace('"fastokd_manifest": 1', '"fastokd_manifest": 2'),
        lambda text: text.replace(", 0, ", ", 7, "),
    ],
)
def test_a_damaged_manifest_is_named(root: Path, spoil: Callable[[str], str]) -> None:
    path = prepare(root, quiet=True).path
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(root)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_prepared_folder_is_tested_on_test_and_streamed_when_cropped_by_area(
    tmp_path: Path, loader: str
) -> None:
    root = write_folder(tmp_path, splits=("train", "val", "test"), count=3)
    prepare(root, quiet=True)
    splits = load_dataset("imagefolder", root, streamed=True, loader=loader)
    assert isinstance(splits.val, DiskSplit)
    memory = load_dataset("imagefolder", root)
    for name in ("train", "val", "test"):
        ours, theirs = read_all(getattr(splits, name)), read_all(getattr(memory, name))
        assert torch.equal(ours[1], theirs[1])
        # At their own size nothing is resampled.
        assert torch.equal(ours[0], theirs[0]), name
    assert splits.mean == pytest.approx(memory.mean)


def test_an_interrupted_manifest_leaves_the_old_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = prepare(root, quiet=True)
    before = done.path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(UserError, match="no space"):
        write_manifest(Manifest(root, ("a", "b"), (0.5,) * 3, (0.5,) * 3, ()), root)
    assert done.path.read_bytes() == before
    assert not list(root.glob("tmp*"))


def test_a_folder_called_imagenet_is_itself_unless_a_data_root_is_given(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "imagenet")
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "imagenet" / "manifest.jsonl"
    for word in ("imagenet", "./imagenet"):
        assert cli.run_command(["prepare", word]) == 0
        said = capsys.readouterr().out
        assert "written to imagenet/manifest.jsonl" in said
        assert ("is meant, since no --data-root is given" in said) == (word == "imagenet")
        mine.unlink()
    assert cli.run_command(["prepare", "imagenet", "--data-root", str(root)]) == 0
    assert not mine.exists()
    capsys.readouterr()
    assert cli.run_command(["prepare", "./imagenet", "--data-root", str(root)]) == 2
    assert "imagenet is the folder: leave --data-root out" in capsys.readouterr().err


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["prepare", "imagenet", "--data-root", str(root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == {"train": 15, "val": 4, "test": 0}
    assert len(facts["quarantined"]) == 6
    assert cli.run_command(["prepare", str(root)]) == 0
    assert "quarantined, 6 files that no run will read:" in capsys.readouterr().out
    assert cli.run_command(["prepare", "imagenet"]) == 2
    assert "give --data-root DIR" in capsys.readouterr().err
    assert cli.run_command(["prepare", str(root), "--data-root", str(root)]) == 2
