"""Pictures as they are in the wild: every loader sees the same, or nobody sees them."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from fastokd.data import Augment, DatasetSplits, DiskSplit, load_dataset, read_all, stream_of
from fastokd.data.decode import MAX_PIXELS, read_rgb
from fastokd.data.disk.manifest import MANIFEST, read_manifest
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.prepared import load_prepared
from fastokd.data.photographs import photographs
from fastokd.data.preprocessing import preprocessing_of
from fastokd.errors import UserError
from tests.data.loaders import LOADERS, alike

ORIENTATIONS = range(1, 9)
# What a viewer does to the stored pixels, undone.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# Decoded by DALI itself.
PLAIN = ("o1.jpg", "grey.jpg", "rgb.png", "mpo.jpg", "CAPS.JPG", "j.jfif", "line.png")
FAULTS = {
    "bomb.png": "more than 134 million pixels",
    "deep.png": "more than 8 bits a channel",
    "float.tif": "more than 8 bits a channel",
    "lab.tif": "its colours are LAB, which aren't read",
    "gif.png": "a GIF, which isn't read",
}
OTHERS = ("anim.gif", "noending", "photo.heic")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def write_wild(folder: Path, photo: Image.Image) -> None:
    """One file of each kind that is read."""
    for o in ORIENTATIONS:
        stored = photo.transpose(STORED[o]) if o > 1 else photo
        for suffix in ("jpg", "png", "tif", "webp"):
            stored.save(folder / f"o{o}.{suffix}", exif=exif(o), quality=95)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, photo.width).astype(np.uint8), (112, 1)))
    clear, grey = photo.copy(), photo.convert("L")
    clear.putalpha(ramp)
    for suffix in ("png", "webp", "tif"):
        clear.save(folder / f"rgba.{suffix}")
    clear.resize((30, 600)).save(folder / "tall.png")  # of several bands
    grey.putalpha(ramp)
    grey.save(folder / "la.png")
    grey = photo.convert("L")
    few = photo.quantize(64)
    few.save(folder / "p.png")
    few.save(folder / "pa.png", transparency=bytes(range(0, 256, 4)))
    few.save(folder / "p1.png", transparency=3)
    photo.save(folder / "trns.png", transparency=photo.getpixel((3, 3)))
    grey.save(folder / "ltrns.png", transparency=100)
    for suffix in ("jpg", "tif"):
        photo.convert("CMYK").save(folder / f"cmyk.{suffix}")
    photo.save(folder / "adobe.jpg", keep_rgb=True)
    photo.save(file := io.BytesIO(), "JPEG")
    # Components of YCbCr's numbers that Adobe's marker says to be RGB, as some scanners write them.
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    (folder / "adobe0.jpg").write_bytes(file.getvalue()[:2] + marker + file.getvalue()[20:])
    photo.convert("YCbCr").save(folder / "ycc.tif")
    photo.convert("1").save(folder / "one.png")
    grey.save(folder / "grey.jpg")
    more = {"save_all": True, "append_images": [photo.transpose(Image.Transpose.ROTATE_180)]}
    photo.save(folder / "pages.tif", **more)
    photo.save(folder / "anim.webp", **more)
    photo.save(folder / "mpo.jpg", format="MPO", **more)
    for name in ("rgb.png", "rgb.bmp", "rgb.ppm", "CAPS.JPG"):
        photo.save(folder / name)
    photo.save(folder / "j.jfif", format="JPEG")
    # Without its last chunk, which other decoders wait for.
    (folder / "noend.png").write_bytes((folder / "rgb.png").read_bytes()[:-12])
    Image.new("RGB", (40_000, 1), "red").save(folder / "line.png")


def write_faults(folder: Path, photo: Image.Image) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(folder / "bomb.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tif")
    profiles = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    lab = ImageCms.profileToProfile(photo, *profiles, outputMode="LAB")
    assert lab is not None
    lab.save(folder / "lab.tif")
    photo.save(folder / "gif.png", format="GIF")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; the first of val has all that is read."""
    root = tmp_path_factory.mktemp("wild")
    photo = photographs()[0].resize((150, 112))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            photo.save(root / split / name / "photo.jpg")
    write_wild(root / "val" / "a", photo)
    prepare(root, quiet=True)
    return root


def by_name(data: DatasetSplits, root: Path) -> dict[str, Tensor]:
    """The first class's images of the test split."""
    files = sorted((root / "val" / "a").iterdir())
    images_NHWC, _ = read_all(data.test)
    return {file.name: images_NHWC[i].int() for i, file in enumerate(files)}


@pytest.mark.parametrize("sizes", [(48, 0), (32, 40)])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_sees_the_same(loader: str, sizes: tuple[int, int], root: Path) -> None:
    ask: Any = {"image_size": sizes[0], "eval_resize": sizes[1]}
    memory = load_dataset("imagefolder", root, **ask)
    data = load_dataset("imagefolder", root, streamed=True, loader=loader, workers=2, **ask)
    assert isinstance(data.test, DiskSplit)
    plain = {data.test.path(i).name for i in data.test.plain_N.nonzero()[:, 0].tolist()}
    assert plain == {*PLAIN, "photo.jpg"}
    ours, theirs = by_name(memory, root), by_name(data, root)
    assert len(ours) > 50
    for name, image in ours.items():
        assert np.array_equal(memory.preprocessing.read(root / "val/a" / name), image), name
        if name in plain:
            assert alike(loader, image.numpy(), theirs[name].numpy()), name
        else:
            assert torch.equal(image, theirs[name]), name
    # Lossless, in the eight ways in which a camera may be held.
    for o in ORIENTATIONS:
        assert torch.equal(ours[f"o{o}.png"], ours["rgb.png"]), o
        assert torch.equal(ours[f"o{o}.tif"], ours["rgb.png"]), o
        assert (ours[f"o{o}.jpg"] - ours["rgb.png"]).abs().float().mean() < 3, o


@pytest.mark.parametrize("loader", LOADERS)
def test_boxes_of_turned_images_are_drawn_upright(loader: str, root: Path) -> None:
    """The same draws of the eight files of one picture give one crop of it."""
    data = load_dataset("imagefolder", root, streamed=True, loader=loader, workers=1)
    split = data.test
    assert isinstance(split, DiskSplit)
    number = {split.path(i).name: i for i in range(len(split))}
    crops = []
    for o in ORIENTATIONS:
        alone = split.select(torch.tensor([number[f"o{o}.tif"]]))
        stream = stream_of(alone, 1, seed=5, augment=Augment(0, resized_crop=True), shuffle=True)
        crops.append(stream.batch(0, 0)[0])
    assert crops[0].float().std() > 5
    assert all(torch.equal(crop, crops[0]) for crop in crops)


@pytest.mark.parametrize("name", ["rgba.png", "la.png", "pa.png", "p1.png", "trns.png", "tall.png"])
def test_transparent_pixels_are_white(name: str, root: Path) -> None:
    """Partly transparent ones in proportion; whatever colour lies hidden under them."""
    with Image.open(root / "val" / "a" / name) as image:
        rgba_HW4 = np.asarray(image.convert("RGBA")).astype(float)
    alpha_HW1 = rgba_HW4[..., 3:] / 255
    assert alpha_HW1.min() < 1
    expected_HW3 = rgba_HW4[..., :3] * alpha_HW1 + 255 * (1 - alpha_HW1)
    seen_HW3 = np.asarray(read_rgb(root / "val" / "a" / name)).astype(float)
    assert abs(seen_HW3 - expected_HW3).max() <= 1
    black = np.asarray(read_rgb(root / "val" / "a" / name, background=0)).astype(float)
    assert abs(black - rgba_HW4[..., :3] * alpha_HW1).max() <= 1


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_show_the_background_of_the_set(loader: str, root: Path) -> None:
    black = dataclasses.replace(preprocessing_of("imagefolder", image_size=48), background=0)
    data = load_prepared("imagefolder", root, black, loader=loader, workers=1)
    assert data.preprocessing.background == 0
    seen = by_name(data, root)
    for name in ("rgba.png", "trns.png"):
        assert np.array_equal(data.preprocessing.read(root / "val/a" / name), seen[name]), name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_isn_t_read_is_listed_and_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.copytree(root / "train", tmp_path / "val")
    folder = tmp_path / "val" / "a"
    write_faults(folder, photographs()[0].resize((150, 112)))
    manifest = prepare(tmp_path, quiet=True).manifest
    faults = {Path(entry.path).name: entry.fault for entry in manifest.quarantined()}
    assert set(faults) == set(FAULTS)
    for name, fault in FAULTS.items():
        assert fault in faults[name]
        with pytest.raises(UserError, match=f"{name}: .*{fault}; convert it") as raised:
            read_rgb(folder / name)
        assert "\n" not in str(raised.value)
    for name in FAULTS:
        if name != "lab.tif":
            (folder / name).unlink()
    splits = load_dataset("imagefolder", tmp_path)
    ((path, fault),) = splits.left_out
    assert path == "val/a/lab.tif"
    assert fault.startswith("its colours are LAB")


def test_files_of_other_endings_are_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.copytree(root / "train", tmp_path / "val")
    for name in OTHERS:
        shutil.copy(root / "train/a/photo.jpg", tmp_path / "train" / "b" / name)
    (tmp_path / "train" / "b" / ".DS_Store").write_bytes(b"x")
    notes = " ".join(prepare(tmp_path, quiet=True).lines())
    for note in (load_dataset("imagefolder", tmp_path).note, notes):
        assert "3 files are left out, since they have none of the extensions .jpg, .jpeg" in note
        assert "(the first: train/b/anim.gif)" in note


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


@pytest.mark.parametrize("loader", ["memory", *LOADERS])
def test_a_thin_picture_costs_no_more_than_a_square(
    loader: str, root: Path, tmp_path: Path
) -> None:
    """40,000 x 1 pixels in 196 bytes: resized whole to 256, they would be gigabytes."""
    for split in ("train", "val"):
        shutil.copytree(root / "train", tmp_path / split)
        for name in ("wide.png", "high.png"):
            size = (40_000, 1) if name == "wide.png" else (1, 40_000)
            Image.new("RGB", size, "red").save(tmp_path / split / "a" / name)
    assert not prepare(tmp_path, quiet=True).manifest.quarantined()
    ask: Any = {"image_size": 224, "eval_resize": 256}
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_megabytes()
    if loader == "memory":
        data = load_dataset("imagefolder", tmp_path, **ask)
    else:
        data = load_dataset("imagefolder", tmp_path, streamed=True, loader=loader, workers=1, **ask)
        assert isinstance(data.train, DiskSplit)
        list(stream_of(data.train, 2, augment=Augment(0, resized_crop=True)).batches(0))
    images_NHWC, _ = read_all(data.test)
    assert peak_megabytes() - before < 500
    red = torch.tensor([255, 0, 0])
    assert (images_NHWC[[0, 2]] == red).all()


def test_a_manifest_of_an_earlier_version_is_completed(root: Path, tmp_path: Path) -> None:
    """It doesn't say which files are turned or rare; their headers do."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    header, *lines = (copy / MANIFEST).read_text().splitlines()
    old = []
    for line in lines:
        split, path, label, height, width, *rest = json.loads(line)
        turned = Path(path).stem in ("o5", "o6", "o7", "o8")
        size = (width, height) if turned else (height, width)
        old.append(json.dumps([split, path, label, *size, *rest[:2]]))
    (copy / MANIFEST).write_text("\n".join([header, *old]) + "\n")
    assert {entry.plain for entry in read_manifest(copy).entries} == {None}
    ask: Any = {"streamed": True, "loader": "torchvision"}
    new, completed = (load_dataset("imagefolder", folder, **ask) for folder in (root, copy))
    assert "run `fastokd prepare` again" in completed.note
    assert "prepare" not in new.note
    for name in ("sizes_N2", "plain_N", "bytes_N"):
        assert torch.equal(getattr(new.test, name), getattr(completed.test, name))


@pytest.mark.parametrize("loader", ["memory", *LOADERS])
def test_decoders_print_nothing(
    loader: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libpng warns of a colour profile, a doubled chunk or one out of place, image by image."""
    photo = photographs()[0].resize((48, 48))
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            photo.save(folder / "plain.png")
            photo.save(folder / "profile.png", icc_profile=b"no profile" * 20)
            whole = (folder / "plain.png").read_bytes()
            srgb = b"\0\0\0\1sRGB\0\xae\xce\x1c\xe9"
            (folder / "doubled.png").write_bytes(whole[:33] + 2 * srgb + whole[33:])
            (folder / "behind.png").write_bytes(whole[:-12] + srgb + whole[-12:])
    prepare(tmp_path, quiet=True)
    streamed: Any = {"streamed": loader != "memory"}
    if loader != "memory":
        streamed |= {"loader": loader, "workers": 2}
    data = load_dataset("imagefolder", tmp_path, image_size=48, **streamed)
    images_NHWC, _ = read_all(data.train)
    assert len(images_NHWC) == 8
    assert capfd.readouterr().err == ""
