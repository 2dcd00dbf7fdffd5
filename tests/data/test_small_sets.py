"""SVHN, STL-10 and Tiny-ImageNet in their published layouts: read right, and every fault named."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.datasets import STL10, SVHN

import fastokd
from fastokd.data import load_dataset
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files, stl10, svhn, tiny_imagenet
from fastokd.errors import UserError
from tests.data.make import pack
from tests.data.twins import write_stl10, write_svhn, write_tiny_imagenet

WRITERS = {"svhn": write_svhn, "stl10": write_stl10, "tiny_imagenet": write_tiny_imagenet}
SIZES = {"svhn": 32, "stl10": 96, "tiny_imagenet": 64}
Damage = Callable[[Path], object]


def test_svhn_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    ours = load_dataset("svhn", tmp_path)
    for name in ("train", "test"):
        theirs = SVHN(str(tmp_path), split=name)
        split = getattr(ours, name)
        assert np.array_equal(split.images_NHWC.permute(0, 3, 1, 2).numpy(), theirs.data)
        assert split.labels_N.tolist() == theirs.labels.tolist()
        assert split.images_NHWC.is_contiguous()
    # The digit 0 is stored as 10.
    assert ours.class_names[ours.train.labels_N[9]] == "0"
    assert ours.val is None


def test_stl10_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stl10(tmp_path)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    ours = load_dataset("stl10", tmp_path)
    for name in ("train", "test"):
        theirs = STL10(str(tmp_path), split=name)
        split = getattr(ours, name)
        assert np.array_equal(split.images_NHWC.permute(0, 3, 1, 2).numpy(), theirs.data)
        assert split.labels_N.tolist() == theirs.labels.tolist()
        assert list(ours.class_names) == theirs.classes
    assert torch.equal(load_dataset("stl10", folder).train.images_NHWC, ours.train.images_NHWC)


def test_stl10_is_read_from_its_archive(tmp_path: Path) -> None:
    folder = write_stl10(tmp_path / "unpacked")
    pack(folder, tmp_path / stl10.ARCHIVE)
    packed, unpacked = load_dataset("stl10", tmp_path), load_dataset("stl10", folder)
    assert torch.equal(packed.test.images_NHWC, unpacked.test.images_NHWC)
    assert torch.equal(packed.train.labels_N, unpacked.train.labels_N)


def test_tiny_imagenet_is_what_its_files_say(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    splits = load_dataset("tiny_imagenet", tmp_path)
    assert splits.class_names == ("goldfish", "cat (n02085620)", "cat (n02124075)")
    ids = sorted(path.name for path in (folder / "train").iterdir())
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    truth = {line.split("\t")[0]: ids.index(line.split("\t")[1]) for line in lines}
    test = splits.test
    assert test.paths_N is not None
    assert len(test) == len(truth) == 12
    for row, path in enumerate(test.paths_N):
        picture = folder / path.decode()
        assert int(test.labels_N[row]) == truth[picture.name]
        expected = np.asarray(Image.open(picture).convert("RGB"))
        assert np.array_equal(test.images_NHWC[row].numpy(), expected)
    assert splits.train.labels_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert splits.note == ""
    assert torch.equal(load_dataset("tiny_imagenet", folder).test.labels_N, test.labels_N)


def test_tiny_imagenet_may_be_smaller(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    assert load_dataset("tiny_imagenet", tmp_path, image_size=32).test.image_size == (32, 32)


def test_tiny_imagenet_leaves_a_damaged_image_out(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "images" / "val_3.JPEG").write_bytes(b"no picture")
    splits = load_dataset("tiny_imagenet", tmp_path)
    assert len(splits.test) == 11
    assert "1 of 30 files are quarantined and not read (the first: val/images/val_3" in splits.note


@pytest.mark.parametrize("name", WRITERS)
def test_the_published_constants(name: str) -> None:
    shown = preprocessing_of(name)
    mean = {
        "svhn": (0.4377, 0.4438, 0.4728),
        "stl10": (0.4467, 0.4398, 0.4066),
        "tiny_imagenet": (0.4802, 0.4481, 0.3975),
    }
    assert (shown.mean, shown.input_size) == (mean[name], SIZES[name])


@pytest.mark.parametrize("name", WRITERS)
def test_validation_images_are_held_out(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    splits = load_dataset(name, tmp_path, val=6)
    assert splits.val is not None
    assert (len(splits.val), splits.val.image_size) == (6, (SIZES[name],) * 2)
    with pytest.raises(UserError, match="comes with"):
        load_dataset(name, tmp_path, test=3)


@pytest.mark.parametrize("name", WRITERS)
def test_a_run_is_trained_evaluated_and_exported(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "data")
    run = fastokd.train(
        f"baseline/resnet8/{name}",
        epochs=1,
        batch_size=8,
        data_root=tmp_path / "data",
        out=tmp_path / "run",
        quiet=True,
    )
    data = load_dataset(name, tmp_path / "data")
    scores = fastokd.evaluate(run)["test"]
    assert scores["student_top1"] == run.last["test"]["student_top1"]
    image = tmp_path / "picture.png"
    Image.fromarray(data.test.images_NHWC[0].numpy()).save(image)
    (prediction,) = fastokd.predict(run, image)
    assert {*prediction.classes} <= {*data.class_names}
    assert fastokd.export(run, "safetensors", tmp_path / "exported").folder.is_dir()


def remove(path: str) -> Damage:
    return lambda root: (root / path).unlink()


def cut(path: str, count: int) -> Damage:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:count])


def write(path: str, content: bytes) -> Damage:
    return lambda root: (root / path).write_bytes(content)


def mat(key: str, change: Callable[[np.ndarray], object]) -> Damage:
    def damage(root: Path) -> None:
        path = root / "train_32x32.mat"
        content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
        content[key] = change(content[key])
        savemat(path, content)

    return damage


TINY = "tiny-imagenet-200"
TRUTH = f"{TINY}/val/val_annotations.txt"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("svhn", remove("train_32x32.mat"), "train_32x32.mat is missing"),
        ("svhn", write("test_32x32.mat", b""), "test_32x32.mat is empty"),
        ("svhn", write("test_32x32.mat", b"hello" * 99), "test_32x32.mat is damaged"),
        ("svhn", cut("train_32x32.mat", 9000), "train_32x32.mat is damaged"),
        ("svhn", mat("X", lambda X: X[:16]), r"uint8 \[16, 32, 3, 30\] under 'X'"),
        ("svhn", mat("X", lambda X: X.astype(float)), "float64"),
        ("svhn", mat("y", lambda y: y[:9]), "has 9 labels for 30 images"),
        ("svhn", mat("y", lambda y: y * 0), "image 0 as class 0, but there are only classes 1 to"),
        ("svhn", mat("y", lambda y: y + 0.5), r"as class 1\.5"),
        ("svhn", mat("y", lambda y: "text"), "no list of class ids"),
        ("stl10", remove("stl10_binary/test_X.bin"), "test_X.bin is missing"),
        ("stl10", cut("stl10_binary/train_X.bin", 30000), "30,000 bytes, which isn't a multiple"),
        ("stl10", cut("stl10_binary/train_X.bin", 3 * 96**2), "has 20 labels for 1 images"),
        ("stl10", write("stl10_binary/train_y.bin", bytes(20)), "labels image 0 as class 0"),
        ("stl10", write("stl10_binary/train_y.bin", b"\x0b" * 20), "as class 11"),
        ("tiny_imagenet", remove(TRUTH), "val_annotations.txt is missing"),
        ("tiny_imagenet", remove(f"{TINY}/words.txt"), "words.txt is missing"),
        ("tiny_imagenet", write(f"{TINY}/words.txt", b"n01443537\tfish"), "no name of n02085620"),
        ("tiny_imagenet", write(TRUTH, b"val_0.JPEG\tn9\t0\t0\t1\t1"), "class 'n9', which train/"),
        ("tiny_imagenet", write(TRUTH, b"\xff\xfe"), "can't read"),
        ("tiny_imagenet", cut(TRUTH, 80), "val_annotations.txt has"),
        ("tiny_imagenet", remove(f"{TINY}/val/images/val_2.JPEG"), "names val_2.JPEG, which isn't"),
        (
            "tiny_imagenet",
            lambda root: shutil.rmtree(root / TINY / "val" / "images"),
            "train on it as imagefolder",
        ),
        (
            "tiny_imagenet",
            lambda root: shutil.rmtree(root / TINY / "train" / "n02085620" / "images"),
            "there is no folder .*n02085620/images",
        ),
    ],
)
def test_a_fault_is_one_sentence(name: str, damage: Damage, said: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        load_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_without_the_set_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no {name} in .*--download"):
        load_dataset(name, tmp_path)
    with pytest.raises(UserError, match="needs to know where its files are"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["svhn", "stl10"])
def test_sizes_that_a_set_lacks_are_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    with pytest.raises(UserError, match=f"size is 48, but {name} is shown at {SIZES[name]}"):
        load_dataset(name, tmp_path, image_size=48)
    with pytest.raises(UserError, match="eval_resize is 99"):
        load_dataset(name, tmp_path, eval_resize=99)


def test_a_packed_tiny_imagenet_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"")
    with pytest.raises(UserError, match="is packed: unpack it there"):
        load_dataset("tiny_imagenet", tmp_path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """torchvision's downloader, MD5 included, with ``folder`` as every site; returns the addresses."""
    asked: list[str] = []

    def fetch(url: str, filename: str) -> None:
        asked.append(url)
        shutil.copy(folder / url.rsplit("/", 1)[1], filename)

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr(
        "torchvision.datasets.utils._get_redirect_url", lambda url, **options: str(url)
    )
    return asked


def test_the_files_are_those_that_torchvision_fetches() -> None:
    assert {svhn.SITE + file: md5 for file, md5 in svhn.MD5.items()} == {
        SVHN.split_list[name][0]: SVHN.split_list[name][2] for name in ("train", "test")
    }
    assert (STL10.url, STL10.tgz_md5) == (stl10.URL, stl10.MD5)


def test_downloads_and_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    asked = served(monkeypatch, site)
    write_svhn(site)
    pack(write_stl10(tmp_path / "a"), site / stl10.ARCHIVE)
    tiny = write_tiny_imagenet(tmp_path / "b")
    with zipfile.ZipFile(site / tiny_imagenet.ARCHIVE, "w") as packed:
        for path in tiny.rglob("*"):
            packed.write(path, path.relative_to(tiny.parent))
    monkeypatch.setattr(svhn, "MD5", {file: md5(site / file) for file in svhn.MD5})
    monkeypatch.setattr(stl10, "MD5", md5(site / stl10.ARCHIVE))
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(site / tiny_imagenet.ARCHIVE))
    sources = {"svhn": site, "stl10": tmp_path / "a", "tiny_imagenet": tmp_path / "b"}
    for name, source in sources.items():
        expected = load_dataset(name, source)
        root = tmp_path / f"new-{name}"
        fetched = load_dataset(name, root, download=True)
        assert torch.equal(fetched.train.images_NHWC, expected.train.images_NHWC), name
        for archive in (stl10.ARCHIVE, tiny_imagenet.ARCHIVE):
            (root / archive).unlink(missing_ok=True)
        before = len(asked)
        again = load_dataset(name, root, download=True)
        assert torch.equal(again.test.labels_N, expected.test.labels_N), name
        assert len(asked) == before, "what is there isn't fetched again"
    assert asked == [*(svhn.SITE + file for file in svhn.MD5), stl10.URL, tiny_imagenet.URL]


def test_an_interrupted_unpacking_leaves_no_half_of_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half there would be taken for the set, and not be fetched again."""
    tiny = write_tiny_imagenet(tmp_path / "source")
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / tiny_imagenet.ARCHIVE, "w") as packed:
        for path in tiny.rglob("*"):
            packed.write(path, path.relative_to(tiny.parent))
    whole = zipfile.ZipFile.extractall

    def interrupted(packed: zipfile.ZipFile, path: Path) -> None:
        whole(packed, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "extractall", interrupted)
    monkeypatch.setattr(files, "download", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("tiny_imagenet", root, download=True)
    assert [path.name for path in root.iterdir()] == [tiny_imagenet.ARCHIVE]
    (root / tiny_imagenet.FOLDER / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="lacks train/ or val/: remove it"):
        load_dataset("tiny_imagenet", root, download=True)


@pytest.mark.parametrize("name", WRITERS)
def test_another_file_than_the_published_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for file in (*svhn.MD5, stl10.ARCHIVE, tiny_imagenet.ARCHIVE):
        (site / file).write_bytes(b"another file")
    served(monkeypatch, site)
    with pytest.raises(UserError, match=f"can't download {name} from"):
        load_dataset(name, tmp_path / "new", download=True)


def test_no_member_is_larger_than_its_archive_may_be(tmp_path: Path) -> None:
    folder = write_stl10(tmp_path)
    pack(folder, tmp_path / stl10.ARCHIVE)
    with pytest.raises(UserError, match="unpacks to more than a data set has"):
        files.read_members(tmp_path / stl10.ARCHIVE, ["stl10_binary/train_y.bin"], 1000)
