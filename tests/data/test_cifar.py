"""CIFAR as torchvision lays it out: read right, and every fault named."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastokd.data import load_dataset
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files
from fastokd.data.sets.cifar import CIFAR
from fastokd.errors import UserError
from tests.data.make import cifar_content, pack, python2_pickle, write_cifar

NAMES = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


@NAMES
def test_reads_what_python_reads(name: str, tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, name, train=100, test=30)
    splits = load_dataset(name, tmp_path)
    cifar = CIFAR[name]
    for split, names in ((splits.train, cifar.train), (splits.test, (cifar.test,))):
        content = [pickle.loads((folder / f).read_bytes(), encoding="bytes") for f in names]
        planes = np.concatenate([part[b"data"] for part in content]).reshape(-1, 3, 32, 32)
        labels = [label for part in content for label in part[cifar.label.encode()]]
        assert torch.equal(split.images_NHWC.permute(0, 3, 1, 2), torch.from_numpy(planes))
        assert split.images_NHWC.is_contiguous()
        assert split.labels_N.tolist() == labels
    assert splits.num_classes == len(set(splits.class_names)) == (10 if name == "cifar10" else 100)
    assert splits.val is None


def test_constants_are_the_papers() -> None:
    assert preprocessing_of("cifar10").mean == (0.4914, 0.4822, 0.4465)
    assert preprocessing_of("cifar10").std == (0.2470, 0.2435, 0.2616)
    assert preprocessing_of("cifar100").mean == (0.5071, 0.4865, 0.4409)
    assert preprocessing_of("cifar100").std == (0.2673, 0.2564, 0.2762)
    fine = CIFAR["cifar100"].class_names
    assert list(fine) == sorted(fine)
    assert (fine[0], fine[52], fine[99]) == ("apple", "oak_tree", "worm")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("text_keys", [False, True])
def test_reads_what_python_3_pickles(protocol: int, text_keys: bool, tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar100")
    expected = load_dataset("cifar100", tmp_path).train
    for file in folder.iterdir():
        content = pickle.loads(file.read_bytes(), encoding="bytes")
        content = {k.decode() if text_keys else k: v for k, v in content.items()}
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    again = load_dataset("cifar100", tmp_path).train
    assert torch.equal(again.images_NHWC, expected.images_NHWC)
    assert torch.equal(again.labels_N, expected.labels_N)


def test_root_may_be_the_folder_itself(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar10")
    assert len(load_dataset("cifar10", folder).train) == 100


@NAMES
def test_reads_the_archive(name: str, tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "unpacked", name)
    pack(folder, tmp_path / CIFAR[name].archive)
    packed, unpacked = load_dataset(name, tmp_path), load_dataset(name, folder.parent)
    assert torch.equal(packed.train.images_NHWC, unpacked.train.images_NHWC)
    assert torch.equal(packed.test.labels_N, unpacked.test.labels_N)
    assert [path.name for path in tmp_path.iterdir() if path.name != "unpacked"] == [
        CIFAR[name].archive
    ]


def test_archive_that_climbs_out_is_refused(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "unpacked", "cifar10")
    link = tarfile.TarInfo("cifar-10-batches-py/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for member in (tarfile.TarInfo("../climbs"), tarfile.TarInfo("/absolute"), link):
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
            tar.addfile(member, io.BytesIO())
        with pytest.raises(UserError, match="which a data set's archive never does"):
            load_dataset("cifar10", tmp_path)


def test_damaged_archive_is_named(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / "unpacked", "cifar10")
    archive = tmp_path / "cifar-10-python.tar.gz"
    pack(folder, archive)
    whole = archive.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-4]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged"):
            load_dataset("cifar10", tmp_path)
    (folder / "test_batch").unlink()
    pack(folder, archive)
    with pytest.raises(UserError, match=r"tar\.gz has no cifar-10-batches-py/test_batch"):
        load_dataset("cifar10", tmp_path)


def test_every_part_of_the_archive_is_checked(tmp_path: Path) -> None:
    """Deflate notices few changed bits; gzip's checksum, at the end, notices all."""
    archive = tmp_path / "cifar-10-python.tar.gz"
    pack(write_cifar(tmp_path / "unpacked", "cifar10"), archive)
    whole = archive.read_bytes()
    # From 100 on, past the header's own file name, which means nothing.
    for position in np.linspace(100, len(whole) - 1, 25).astype(int):
        changed = bytearray(whole)
        changed[position] ^= 1
        archive.write_bytes(changed)
        with pytest.raises(UserError, match=r"tar\.gz"):
            load_dataset("cifar10", tmp_path)


def test_archive_of_zeros_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(write_cifar(tmp_path / "unpacked", "cifar10"), tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr(files, "MAX_ARCHIVE", 10_000)
    with pytest.raises(UserError, match="unpacks to more than a data set has"):
        load_dataset("cifar10", tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither cifar-10-batches-py/ nor .*--download"):
        load_dataset("cifar10", tmp_path)
    folder = write_cifar(tmp_path, "cifar10")
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_3 is missing: .*--download"):
        load_dataset("cifar10", tmp_path)


def put(**entries: Any) -> Callable[[bytes], bytes]:
    """A change of a file: some entries of its dictionary replaced, or dropped where None."""

    def change(whole: bytes) -> bytes:
        content = pickle.loads(whole, encoding="bytes")
        content |= {key.encode(): value for key, value in entries.items()}
        return python2_pickle({k: v for k, v in content.items() if v is not None})

    return change


PIXELS = cifar_content("cifar10", 20, np.random.default_rng(0))[b"data"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[: len(whole) // 2], "it ends too early"),
        (lambda whole: whole[:-1], "it ends too early"),
        (lambda whole: b"\x89PNG" + whole, "can't be read"),
        (lambda whole: pickle.dumps([1, 2], protocol=2), "holds no dictionary"),
        (put(data=None), "has no images under 'data'"),
        (put(data=b"bytes"), "has no images under 'data'"),
        (put(data=PIXELS.astype(np.int32)), "has no images under 'data'"),
        (put(data=PIXELS[:, :-1].copy()), "images of 3071 bytes"),
        (put(data=PIXELS[:0], labels=[]), "0 images"),
        (put(data=PIXELS[:-1]), "19 images but 20 labels"),
        (put(labels=None), "no list of class ids under 'labels'"),
        (put(labels=[0.5] * 20), "no list of class ids under 'labels'"),
        (put(labels=[1 << 40] * 20), "no list of class ids under 'labels'"),
        (put(labels=[0] * 19 + [10]), "labels image 19 as class 10, .* classes 0 to 9"),
        (put(labels=[-1] + [0] * 19), "labels image 0 as class -1"),
        (put(labels=np.full(20, 255, np.uint8)), "labels image 0 as class 255"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch"])
def test_damage_is_named(
    change: Callable[[bytes], bytes], says: str, file: str, tmp_path: Path
) -> None:
    path = write_cifar(tmp_path, "cifar10") / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}.*{says}.*(again|--download)"):
        load_dataset("cifar10", tmp_path)


def test_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made.tar.gz"
    pack(write_cifar(tmp_path / "unpacked", "cifar10"), made)
    calls = []

    def fetch(url: str, root: str, filename: str | None = None, md5: str | None = None) -> None:
        calls.append((url, md5))
        Path(root, url.rsplit("/", 1)[1]).write_bytes(made.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    root = tmp_path / "new" / "root"
    assert len(load_dataset("cifar10", root, download=True).train) == 100
    ((url, md5),) = calls
    from torchvision.datasets import CIFAR10, CIFAR100

    assert (url, md5) == (CIFAR10.url, CIFAR10.tgz_md5)
    assert (CIFAR["cifar100"].archive, CIFAR["cifar100"].md5) == (
        CIFAR100.filename,
        CIFAR100.tgz_md5,
    )
    # What is there already isn't fetched.
    load_dataset("cifar10", tmp_path / "unpacked", download=True)
    assert len(calls) == 1


def test_failed_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(UserError, match=r"can't download cifar100 from https.*no route to host"):
        load_dataset("cifar100", tmp_path, download=True)
