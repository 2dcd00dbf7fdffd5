"""Images packed into Arrow files and tar archives: the libraries' own bytes, and every fault named."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.data import Augment, DiskSplit, load_dataset, read_all, stream_of
from fastokd.data.decode import centre
from fastokd.data.held_out import listed
from fastokd.data.packed import load
from fastokd.data.packed.hf import list_hf
from fastokd.data.packed.wds import list_wds
from fastokd.data.views import View
from fastokd.errors import DataFileError, UserError
from fastokd.recipe.names import recipe
from fastokd.train import train
from tests.data.twins import pictures, write_hf, write_shard, write_wds

WRITERS: dict[str, Callable[[Path], Path]] = {"hf": write_hf, "wds": write_wds}
KINDS = pytest.mark.parametrize("kind", WRITERS)
Damage = Callable[[Path], object]


@pytest.mark.parametrize("shards", [1, 3])
def test_hf_images_are_those_of_datasets(shards: int, tmp_path: Path) -> None:
    root = write_hf(tmp_path / "set", shards=shards)
    found, names = list_hf(root)
    saved = datasets.load_from_disk(str(root))
    assert names == ("cat", "dog")
    memory = load_dataset("hf", root)
    for split, packed in found.items():
        rows = saved[split].cast_column("image", datasets.Image(decode=False))
        read = packed.file_of(root)
        assert [read(i).getvalue() for i in range(len(rows))] == [r["bytes"] for r in rows["image"]]
        assert packed.labels_N.tolist() == list(rows["label"])
        decoded = [centre(image.convert("RGB"), View(32)) for image in saved[split]["image"]]
        assert np.array_equal(getattr(memory, split).images_NHWC.numpy(), np.stack(decoded))


def test_wds_images_are_those_of_the_archives(tmp_path: Path) -> None:
    found, names = list_wds(write_wds(tmp_path))
    assert names == ("cat", "dog")
    for split, packed in found.items():
        images, labels = [], []
        for shard in sorted(tmp_path.glob(f"{split}*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    if member.name.endswith((".png", ".jpg")):
                        images.append(content.read())
                    elif member.name.endswith(".cls"):
                        labels.append(int(content.read()))
        read = packed.file_of(tmp_path)
        assert [read(index).getvalue() for index in range(len(packed))] == images
        assert packed.labels_N.tolist() == labels


@KINDS
def test_streamed_is_in_memory(kind: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path / "set")
    memory, disk = load_dataset(kind, root), load_dataset(kind, root, streamed=True, workers=1)
    assert isinstance(disk.train, DiskSplit)
    assert (disk.loader, disk.class_names) == ("torchvision", memory.class_names)
    for split in ("train", "test"):
        images_NHWC, labels_N = read_all(getattr(disk, split))
        assert torch.equal(images_NHWC, getattr(memory, split).images_NHWC)
        assert torch.equal(labels_N, getattr(memory, split).labels_N)
    # Of memory, mean and deviation are those of the crops.
    assert disk.mean == pytest.approx(memory.mean, abs=0.02)
    pixels = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures(12, 0)]
    assert disk.mean == pytest.approx(np.concatenate(pixels).mean((0, 1)) / 255, abs=1e-9)


@KINDS
def test_a_batch_is_made_again(kind: str, tmp_path: Path) -> None:
    split = load_dataset(kind, WRITERS[kind](tmp_path / "set"), streamed=True, workers=2).train
    augment = Augment(0, "zeros", True, True)
    stream = stream_of(split, 5, seed=3, augment=augment, shuffle=True)
    batches = list(stream.batches(1))
    for index, (images_BHWC, labels_B) in enumerate(batches):
        again_BHWC, again_B = stream.batch(1, index)
        assert torch.equal(images_BHWC, again_BHWC)
        assert torch.equal(labels_B, again_B)
    assert not torch.equal(batches[0][0], stream.batch(2, 0)[0])


@KINDS
@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_images_are_listed(kind: str, streamed: bool, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path / "set")
    splits = load_dataset(kind, root, val=4, streamed=streamed)
    facts = listed(splits)
    assert (len(facts["train"]), len(facts["val"])) == (8, 4)
    assert len({*facts["train"], *facts["val"]}) == 12
    again = load_dataset(kind, root, val=4, streamed=streamed, kept=facts, begun=True)
    assert again.val is not None
    assert splits.val is not None
    assert torch.equal(read_all(again.val)[0], read_all(splits.val)[0])


@KINDS
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_names_its_set_and_is_resumed(
    kind: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[kind](tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    crop: dict[str, Any] = {"resized_crop": True, "crop_padding": 0} if streamed else {}
    of = recipe(f"baseline/resnet8/{kind}:set", epochs=2, batch_size=4, **crop)
    options: dict[str, Any] = {"device": "cpu", "quiet": True, "workers": 1, "engine": "loop"}
    whole = train(of, out=tmp_path / "whole", **options)
    train(of, out=tmp_path / "cut", max_steps=4, **options)
    # The run knows where its set is, from everywhere.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = fastokd.resume(tmp_path / "cut", quiet=True)
    assert resumed.last["test"] == whole.last["test"]
    mine, other = (newest_checkpoint(r.folder / "checkpoints")[1] for r in (resumed, whole))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert fastokd.evaluate(whole)["test"]["student_top1"] == whole.last["test"]["student_top1"]
    (tmp_path / "picture.png").write_bytes(pictures(1, 9)[0])
    (prediction,) = fastokd.predict(whole, tmp_path / "picture.png")
    assert {*prediction.classes} == {"cat", "dog"}
    exported = fastokd.export(whole, "safetensors", tmp_path / "exported")
    assert exported.folder.is_dir()
    shutil.move(tmp_path / "set", tmp_path / "moved")
    with pytest.raises(UserError, match="--data-root"):
        fastokd.evaluate(whole)
    moved = fastokd.evaluate(whole, data_root=tmp_path / "moved")
    assert moved["test"]["student_top1"] == whole.last["test"]["student_top1"]


def test_a_name_carries_its_place() -> None:
    of = recipe("okddip-network@2/resnet8/hf:/data/my set/v1")
    assert (of.dataset, of.students, of.image_size) == ("hf:/data/my set/v1", 2, 32)
    assert recipe("baseline/resnet8/wds").dataset == "wds"
    for wrong in ("baseline/resnet8/cifar10/x", "baseline/resnet8/cifar10:x", "baseline/hf:x"):
        with pytest.raises(UserError):
            recipe(wrong)


def saved(root: Path, rows: list[dict[str, Any]], **features: Any) -> Path:
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features) or None)
    made.save_to_disk(str(root))
    return root


IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])


def rows(count: int = 20, **others: Any) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": p, "path": None}, "label": i % 2, **others}
        for i, p in enumerate(pictures(count, 0))
    ]


def test_hf_without_splits_is_split(tmp_path: Path) -> None:
    splits = load_dataset("hf", saved(tmp_path / "one", rows(), image=IMAGE, label=LABEL))
    assert splits.val is not None
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [16, 2, 2]


def test_hf_classes_may_be_whole_numbers(tmp_path: Path) -> None:
    root = saved(tmp_path / "one", rows(), image=IMAGE, label=datasets.Value("int32"))
    assert load_dataset("hf", root).class_names == ("0", "1")


def test_hf_rows_may_be_selected(tmp_path: Path) -> None:
    """A selection of rows is saved with an Arrow file of its own."""
    whole = datasets.Dataset.from_list(rows(), features=datasets.Features(image=IMAGE, label=LABEL))
    whole.select([7, 3, 11, 2, 0, 1, 9, 8]).save_to_disk(str(tmp_path / "some"))
    found, _ = list_hf(tmp_path / "some")
    read = found["train"].file_of(tmp_path)
    expected = [pictures(20, 0)[index] for index in (7, 3, 11, 2, 0, 1, 9, 8)]
    assert [read(index).getvalue() for index in range(8)] == expected


def test_splits_by_other_names(tmp_path: Path) -> None:
    root = write_hf(tmp_path / "a", splits={"train": 8, "validation": 4, "extra": 2})
    splits = load_dataset("hf", root)
    assert (len(splits.test), splits.val) == (4, None)
    assert splits.note == f"the split 'extra' isn't read\n{load.NO_TEST}"
    root = write_hf(tmp_path / "b", splits={"train": 8, "validation": 4, "test": 2})
    splits = load_dataset("hf", root)
    assert splits.val is not None
    assert (len(splits.test), len(splits.val), splits.note) == (2, 4, "")
    for index, split in enumerate(("train", "val", "test")):
        write_shard(tmp_path / "c" / split / "0.tar", pictures(4, index))
    splits = load_dataset("wds", tmp_path / "c")
    assert splits.val is not None
    assert splits.class_names == ("0", "1")
    write_shard(tmp_path / "d" / "0.tar", pictures(20, 0))
    assert len(load_dataset("wds", tmp_path / "d").test) == 2


def test_a_split_without_labels_is_not_read(tmp_path: Path) -> None:
    root = write_hf(tmp_path / "set", splits={"train": 8, "validation": 4, "test": 4})
    made = datasets.load_from_disk(str(root))
    unknown = made["test"].remove_columns("label").add_column("label", [-1] * 4)
    made["test"] = unknown.cast(made["train"].features)
    made.save_to_disk(str(tmp_path / "again"))
    splits = load_dataset("hf", tmp_path / "again")
    assert "the split 'test' has no labels and isn't read" in splits.note
    assert len(splits.test) == 4
    made["test"] = unknown.remove_columns("label")
    made.save_to_disk(str(tmp_path / "lacking"))
    assert load_dataset("hf", tmp_path / "lacking").note == splits.note


def hf_of(change: Callable[[list[dict[str, Any]]], object], **features: Any) -> Damage:
    def write(root: Path) -> None:
        some = rows(note=1)
        change(some)
        saved(
            root,
            some,
            **{"image": IMAGE, "label": LABEL, "note": datasets.Value("int8")} | features,
        )

    return write


def unlike(names: Sequence[str] = (), rename: Sequence[str] = ()) -> Damage:
    """A test split with other classes or another column than train's."""

    def write(root: Path) -> None:
        made = datasets.load_from_disk(str(write_hf(root.with_name("whole"))))
        if rename:
            made["test"] = made["test"].rename_column(*rename)
        if names:
            made["test"] = made["test"].cast_column("label", datasets.ClassLabel(names=list(names)))
        made.save_to_disk(str(root))

    return write


def without(*names: str) -> Damage:
    def write(root: Path) -> None:
        features = {"image": IMAGE, "label": LABEL, "note": datasets.Value("string")}
        kept = {name: kind for name, kind in features.items() if name not in names}
        some = [{name: row[name] for name in kept} for row in rows(note="x")]
        saved(root, some, **kept)

    return write


def then(write: Damage, damage: Damage) -> Damage:
    return lambda root: (write(root), damage(root))


def cut(pattern: str, share: float) -> Damage:
    def damage(root: Path) -> None:
        path = next(root.rglob(pattern))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def shard(name: str, parts: dict[str, bytes]) -> Damage:
    def damage(root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / name, "w") as tar:
            for member_name, content in parts.items():
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return damage


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("hf", lambda root: root.mkdir(), "holds no set saved by Hugging Face's datasets"),
        ("hf", then(write_hf, cut("*.arrow", 0.5)), "save the set again with save_to_disk"),
        ("hf", then(write_hf, cut("dataset_info.json", 0.5)), "can't be loaded by datasets"),
        ("hf", without("image"), r"no columns of type Image among label \(ClassLabel\)"),
        ("hf", without("label"), "no columns of type ClassLabel"),
        ("hf", hf_of(lambda rows: None, note=LABEL), ""),
        ("hf", hf_of(lambda rows: rows[3].update(image=None)), "without the bytes of an image"),
        ("hf", hf_of(lambda rows: rows[3].update(label=None)), "without a class in 'label'"),
        ("hf", hf_of(lambda rows: rows[3].update(label=-1)), "/3 has the class -1, but there are"),
        (
            "hf",
            hf_of(lambda rows: rows[3].update(label=10**12), label=datasets.Value("int64")),
            "id 10",
        ),
        ("hf", unlike(rename=("image", "picture")), "'test' of .* has another column of images"),
        ("hf", unlike(names=["dog", "cat"]), "or other classes than 'train'"),
        ("wds", shard("a.tar", {"x.png": b"1", "x.cls": b"99999999"}), "but only 1 images"),
        (
            "wds",
            then(write_wds, lambda root: (root / "train-9.tar").symlink_to("x")),
            "train-9.tar is",
        ),
        ("wds", lambda root: root.mkdir(), r"has no shards \(\*.tar\)"),
        ("wds", shard("a.tar.gz", {}), "is compressed"),
        ("wds", then(write_wds, shard("more.tar", {})), "more.tar has no split in its name"),
        ("wds", then(write_wds, cut("train-000001.tar", 0.3)), "train-000001.tar is damaged"),
        ("wds", shard("a.tar", {"x.txt": b"1"}), "a.tar has no images"),
        ("wds", shard("a.tar", {"x.png": b"1"}), "no .cls of x"),
        ("wds", shard("a.tar", {"x.cls": b"1"}), "no image of x"),
        ("wds", shard("a.tar", {"x.png": b"1", "x.cls": b"cat"}), "b'cat' as the class id of x"),
        ("wds", shard("a.tar", {"x.png": b"1", "x.cls": b"-1"}), "b'-1' as the class id"),
        ("wds", shard("a.tar", {"x.png": b"1", "x.jpg": b"1"}), "two images called x"),
        ("wds", shard("a.tar", {"x.png": b"1", "x.cls": b"0"}), "has 1 classes"),
        (
            "wds",
            then(write_wds, lambda root: (root / "classnames.txt").write_text("cat\n")),
            "1 different names, and the shards have classes 0 to 1",
        ),
        (
            "wds",
            then(write_wds, lambda root: [p.unlink() for p in root.glob("train*")]),
            "no split called train",
        ),
    ],
)
def test_a_fault_is_one_sentence(kind: str, damage: Damage, said: str, tmp_path: Path) -> None:
    damage(tmp_path / "set")
    if not said:
        load_dataset(kind, tmp_path / "set")
        return
    with pytest.raises(UserError, match=said) as caught:
        load_dataset(kind, tmp_path / "set")
    assert "\n" not in str(caught.value)


@KINDS
def test_faults_of_the_arguments(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="give --data-root"):
        load_dataset(kind)
    with pytest.raises(UserError, match="there is no folder"):
        load_dataset(f"{kind}:{tmp_path / 'gone'}")
    root = WRITERS[kind](tmp_path / "set")
    with pytest.raises(UserError, match="choose torchvision"):
        load_dataset(kind, root, streamed=True, loader="dali")
    monkeypatch.setattr(load, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="stream it from disk"):
        load_dataset(kind, root)


def test_without_datasets_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"install fastokd\[hf\]"):
        load_dataset("hf", tmp_path)


def test_damaged_images_are_left_out(tmp_path: Path) -> None:
    images = pictures(30, 0)
    images[3] = images[3][:1000]  # its header is whole
    images[4] = b"no image"
    write_shard(tmp_path / "train.tar", images)
    write_shard(tmp_path / "test.tar", pictures(4, 1))
    memory = load_dataset("wds", tmp_path)
    assert [path for path, _ in memory.left_out] == [
        "train.tar/000003.jpg",
        "train.tar/000004.jpg",
    ]
    assert len(memory.train) == 28
    assert "2 of 34 files are quarantined" in memory.note
    disk = load_dataset("wds", tmp_path, streamed=True, workers=1)
    assert [path for path, _ in disk.left_out] == ["train.tar/000004.jpg"]
    with pytest.raises(DataFileError, match=r"train.tar/000003.jpg: can't be decoded.*replace it"):
        read_all(disk.train)


def test_a_shard_that_shrinks_is_named(tmp_path: Path) -> None:
    disk = load_dataset("wds", write_wds(tmp_path), streamed=True, workers=1)
    cut("test-000001.tar", 0.2)(tmp_path)
    with pytest.raises(DataFileError, match=r"test-000001.tar has changed; put it back"):
        read_all(disk.test)
