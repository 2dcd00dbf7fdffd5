"""A prepared folder that has changed since is noticed before a run; mean and deviation are those of the
images that are trained on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastokd.data import DiskSplit, Split, load_dataset, read_all
from fastokd.data.disk import outgrown
from fastokd.data.disk.manifest import MANIFEST, read_manifest
from fastokd.data.disk.prepare import prepare
from fastokd.errors import UserError
from fastokd.export import export
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.student.weights import student_facts
from fastokd.train import train
from tests.data.make import write_folder


def streamed(root: Path, **options: object) -> int:
    """Images to train on."""
    splits = load_dataset("imagefolder", root, streamed=True, loader="torchvision", **options)  # type: ignore[arg-type]
    return len(splits.train)


def add(*paths: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "train/cat/0.png", root / path)

    return change


def exchange(*splits: str) -> Callable[[Path], None]:
    """Two classes' folders, whose files are as large."""

    def change(root: Path) -> None:
        for split in splits:
            cat, dog = root / split / "cat", root / split / "dog"
            cat.rename(root / "x")
            dog.rename(cat)
            (root / "x").rename(dog)

    return change


def rewrite(root: Path) -> None:
    """A class's folder made anew, of other pictures."""
    names = sorted(path.name for path in (root / "train/cat").iterdir())
    shutil.rmtree(root / "train/cat")
    (root / "train/cat").mkdir()
    for name in names:
        shutil.copyfile(root / "train/dog" / name, root / "train/cat" / name)


def touch(root: Path) -> None:
    """Other pixels in as many bytes, as an editor of bitmaps leaves them."""
    path = root / "train/cat/2.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add("train/cat/9.png"), r"1 file was added \(train/cat/9.png\); run"),
        (
            add("train/cat/8.png", "val/cat/8.png", "val/cat/9.png"),
            r"3 files were added \(.*, \.\.\.",
        ),
        (add("train/cow/0.png"), r"1 class was added \(cow\), 1 file was added"),
        (add("val/cow/0.png"), "has a class 'cow' that train/ lacks"),
        (add("test/cat/0.png"), r"1 file was added \(test/cat/0.png\)"),
        (lambda root: (root / "val/dog/0.png").unlink(), r"1 file is gone \(val/dog/0.png\)"),
        (lambda root: shutil.rmtree(root / "train"), "there is no folder"),
        (
            lambda root: (root / "train/cat/1.png").rename(root / "train/cat/x.png"),
            r"1 file was added \(train/cat/x.png\), 1 file is gone \(train/cat/1.png\)",
        ),
        (
            lambda root: [(root / s / "dog").rename(root / s / "hound") for s in ("train", "val")],
            r"1 class was added \(hound\), 1 class is gone \(dog\), 8 files were added",
        ),
        (
            lambda root: (root / "train/cat/1.png").write_bytes(b"x"),
            r"1 file has changed \(train/cat/1.png\)",
        ),
        (touch, r"1 file has changed \(train/cat/2.png\)"),
        (
            lambda root: (add("train/cat/9.png")(root), touch(root)),
            r"1 file was added \(train/cat/9.png\), 1 file has changed \(train/cat/2.png\)",
        ),
    ],
)
def test_what_changed_is_named(
    tmp_path: Path,
    change: Callable[[Path], object],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write_folder(tmp_path / "set")
    prepare(root, quiet=True)
    assert streamed(root) == 8
    change(root)
    with pytest.raises(UserError, match=says) as raised:
        streamed(root)
    assert "\n" not in str(raised.value)
    assert f"run `fastokd prepare {root}` again" in str(raised.value)
    # A run that has begun goes on with what it began with.
    assert streamed(root, begun=True) == 8
    assert "has changed since it was prepared" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [exchange("train"), exchange("train", "val"), rewrite],
    ids=["train's folders", "all folders", "rewritten"],
)
def test_pictures_of_one_size_that_were_exchanged_are_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    for number, path in enumerate(
        f"{split}/{name}/{i}.bmp"
        for split in ("train", "val")
        for name in ("cat", "dog")
        for i in range(2)
    ):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(tmp_path / "set" / path)
        os.utime(tmp_path / "set" / path, ns=(0, (number + 1) * 1_000_000_000))
    for number, folder in enumerate(sorted((tmp_path / "set").rglob("*/"))):
        os.utime(folder, ns=(0, (number + 1) * 1_000_000_000))
    prepare(tmp_path / "set", quiet=True)
    change(tmp_path / "set")
    with pytest.raises(UserError, match="files have changed"):
        streamed(tmp_path / "set")


def test_a_file_that_was_repaired_is_noticed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    broken = {name: root / f"train/cat/{name}.png" for name in ("empty", "cut", "text")}
    good = (root / "train/cat/0.png").read_bytes()
    broken["empty"].write_bytes(b"")
    broken["cut"].write_bytes(good[: len(good) // 2])
    broken["text"].write_text("no image")
    prepare(root, quiet=True)
    assert streamed(root) == 8
    for path in broken.values():
        kept = path.read_bytes()
        path.write_bytes(good)
        with pytest.raises(UserError, match=rf"1 file has changed \({path.relative_to(root)}\)"):
            streamed(root)
        path.write_bytes(kept)
        prepare(root, quiet=True)


def test_no_more_files_are_looked_at_than_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "set")
    prepare(root, quiet=True)
    for path in root.rglob("*.png"):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    monkeypatch.setattr(outgrown, "CHECKED", 6)  # of 16: every third
    with pytest.raises(
        UserError, match=r": 6 files have changed \(train/cat/0.png, train/cat/3.png"
    ):
        streamed(root)
    monkeypatch.setattr(outgrown, "CHECKED", 5)
    with pytest.raises(UserError, match=": 4 files have changed"):
        streamed(root)


def test_a_set_that_was_moved_or_copied_is_the_same(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    (root / "train/cat/cut.png").write_bytes(b"")
    (root / "notes.txt").write_text("beside it")
    prepare(root, quiet=True)
    (root / "runs").mkdir()
    moved = root.rename(tmp_path / "moved")
    assert streamed(moved) == 8
    # All times are others.
    shutil.copytree(moved, tmp_path / "copy", copy_function=shutil.copyfile)
    for folder in (tmp_path / "copy").rglob("*"):
        os.utime(folder)
    assert streamed(tmp_path / "copy") == 8
    prepare(moved, out=tmp_path / "apart", quiet=True)
    add("train/cat/9.png")(moved)
    with pytest.raises(UserError, match=rf"fastokd prepare {moved} --out {tmp_path / 'apart'}`"):
        streamed(tmp_path / "apart")


def as_earlier(root: Path) -> None:
    """The manifest as versions wrote it that didn't note times and sums."""
    path = root / MANIFEST
    header, *rows = map(json.loads, path.read_text().splitlines())
    del header["folders"]
    path.write_text("\n".join(json.dumps(line) for line in (header, *(row[:7] for row in rows))))


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    manifest = prepare(root, quiet=True).manifest
    as_earlier(root)
    assert read_manifest(root).mean == manifest.mean
    add("train/cat/9.png")(root)
    assert streamed(root) == streamed(root, val=2) + 2 == 8
    splits = load_dataset("imagefolder", root, streamed=True, loader="torchvision", val=2)
    assert (splits.mean, splits.with_held_out) == (manifest.mean, None)


@pytest.mark.parametrize("form", ["memory", "streamed"])
def test_held_out_images_don_t_enter_mean_and_deviation(tmp_path: Path, form: str) -> None:
    root = write_folder(tmp_path / "set", count=6, size=(32, 32))
    for image in (root / "train/dog").glob("[0-3].png"):  # of which some are held out
        shutil.copy(root / "train/cat/0.png", image)
    prepare(root, quiet=True)
    options = {"streamed": form == "streamed", "loader": "torchvision"}
    whole = load_dataset("imagefolder", root, **options)  # type: ignore[arg-type]
    assert whole.with_held_out is None
    splits = load_dataset("imagefolder", root, val=5, **options)  # type: ignore[arg-type]
    assert isinstance(splits.train, (Split, DiskSplit))
    pixels = read_all(splits.train)[0].double().flatten(0, 2) / 255
    assert splits.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert splits.std == pytest.approx(pixels.std(0, unbiased=False).tolist(), abs=1e-12)
    assert splits.with_held_out == (whole.mean, whole.std)
    assert not np.allclose(splits.mean, whole.mean, atol=1e-4)


def test_a_run_of_an_earlier_version_keeps_what_it_was_trained_with(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", count=6)
    ours = recipe("ind-branch/resnet8/imagefolder", val=4, batch_size=4, epochs=1, students=2)
    options = RunOptions(data_root=root, engine="loop", precision="fp32", device="cpu")
    session = build(ours, options)
    mean, std = session.data.with_held_out or ((), ())
    assert mean != session.data.mean
    tensors, facts = session.state()
    facts |= {"mean": list(mean), "std": list(std)}
    resumed = build(ours, options)
    resumed.load_state(tensors, facts)
    assert (resumed.data.mean, resumed.data.std) == (mean, std)
    said = student_facts(ours, resumed.data.class_names, resumed.data.preprocessing, 0)
    assert json.loads(said["mean"]) == list(mean)
    x_BHWC = read_all(session.data.train)[0][:2].float()
    expected = (x_BHWC / 255 - torch.tensor(mean)) / torch.tensor(std)
    seen = x_BHWC * resumed.learner.cohort.scale_C + resumed.learner.cohort.shift_C
    torch.testing.assert_close(seen, expected)
    facts["mean"] = [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="trained on other data: its mean differ"):
        build(ours, options).load_state(tensors, facts)


def test_an_export_is_compared_by_the_runs_own_statistics(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", count=6, size=(32, 32))
    ours = recipe("ind-branch/resnet8/imagefolder", batch_size=6, epochs=1, students=2)
    options = RunOptions(data_root=root, engine="loop", precision="fp32", device="cpu", quiet=True)
    run = train(ours, options, out=tmp_path / "run")
    before = load_dataset("imagefolder", root).mean
    Image.new("RGB", (32, 32), (220, 200, 180)).save(root / "train/dog/0.png")
    assert load_dataset("imagefolder", root).mean != pytest.approx(before, abs=0.01)
    found = export(run.folder, "safetensors", options=options)
    assert "within its cohort, engine loop" in found.lines[1]
