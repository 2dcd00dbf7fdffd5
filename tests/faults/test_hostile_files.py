"""Files that were made to do harm are refused: they run nothing, write nothing elsewhere, and take
no memory for what they only claim."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fastokd.checkpoint import load_checkpoint, save_checkpoint
from fastokd.data.disk.manifest import Entry, Manifest, read_manifest, write_manifest
from fastokd.errors import UserError
from fastokd.evaluate import evaluate
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.facts import run_path
from fastokd.run.folder import RunFolder
from fastokd.run.options import RunOptions
from fastokd.student import authors
from fastokd.student.convert import convert
from fastokd.student.file import read_weights
from fastokd.train import train

SMALL = recipe("baseline/resnet8/digits", epochs=1, batch_size=50)
QUICK: dict[str, Any] = {"engine": "loop", "precision": "fp32", "device": "cpu", "quiet": True}


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.mark,))


# What reads a file that somebody may have sent.
READERS: dict[str, Callable[[Path], object]] = {
    "authors.load": lambda path: authors.load(path),
    "authors.load, model named": lambda path: authors.load(path, model="resnet32"),
    "evaluate": lambda path: evaluate(path, dataset="digits"),
    "convert": lambda path: convert(path),
    "a teacher, an --init, an export's source": read_weights,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["zip", "old", "pickle", "safetensors"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, reader: str, form: str) -> None:
    mark = tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "epoch": Hostile(mark)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form in ("zip", "old"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"x\.(pth|safetensors)"):
        READERS[reader](path)
    assert not mark.exists()
    if form != "safetensors":
        with open(path, "rb") as file:  # it is hostile: torch itself would run it
            torch.load(file, weights_only=False) if form != "pickle" else pickle.load(file)
        assert mark.exists()


def bomb(path: Path, kind: str) -> None:
    """A zip that says it is a checkpoint of 64 GiB, or is one of 1 GiB that was packed well."""
    torch.save({"state_dict": {"a": torch.zeros(1 << 20)}, "epoch": 0}, path)
    if kind == "packed":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(f"{path}.new", "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, bytes(1 << 28) if name.endswith("data/0") else old.read(name))
        os.replace(f"{path}.new", path)
        return
    with zipfile.ZipFile(path) as old:
        (member,) = [info for info in old.infolist() if info.filename.endswith("data/0")]
    data = bytearray(path.read_bytes())
    # Sizes in the central directory.
    at = data.rindex(member.filename.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["packed", "claimed"])
def test_a_zip_bomb_takes_no_memory(tmp_path: Path, kind: str) -> None:
    bomb(tmp_path / "x.pth", kind)
    before = memory()
    with pytest.raises(UserError, match=r"x\.pth is refused: it unpacks to more than it holds"):
        authors.load(tmp_path / "x.pth")
    assert memory() - before < 100 << 20


def test_a_zip_that_cannot_be_looked_through_is_refused(tmp_path: Path) -> None:
    """One that asks for a newer reader: torch's own doesn't mind, and would unpack it."""
    path = tmp_path / "x.pth"
    bomb(path, "packed")
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 6 : at + 8] = struct.pack("<H", 90)  # version 9.0
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)
    before = memory()
    with pytest.raises(UserError, match=r"x\.pth is no checkpoint of torch"):
        authors.load(path)
    assert memory() - before < 100 << 20


def memory() -> int:
    """The most that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def test_an_old_checkpoint_that_claims_too_much(tmp_path: Path) -> None:
    """A storage of 2^40 numbers, of which there are four."""
    path = tmp_path / "x.pth"
    content = {"state_dict": {"a": torch.zeros(4)}, "epoch": 0}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x04") >= 1
    path.write_bytes(data.replace(b"K\x04", b"\x8a\x06" + struct.pack("<Q", 1 << 40)[:6]))
    with pytest.raises(UserError, match=r"x\.pth"):
        authors.load(path)


HEADERS: dict[str, Any] = {
    "huge": (1 << 62, b""),
    "negative": (1 << 63, b""),
    "longer than the file": (500, b"{}"),
    "no JSON": (4, b"\xff\xfe{}"),
    "deep": (200_000, b'{"a":' * 40_000),
    "overlapping": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])},
    "a hole": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [12, 20])},
    "backwards": {"a": ("F32", [2], [8, 0])},
    "beyond the end": {"a": ("F32", [1 << 40], [0, 1 << 42])},
    "an overflowing shape": {"a": ("F32", [1 << 33, 1 << 33], [0, 8])},
    "negative sizes": {"a": ("F32", [-2, -1], [0, 8])},
    "another length": {"a": ("F32", [3], [0, 8])},
    "an unknown type": {"a": ("F99", [2], [0, 8])},
    "no offsets": {"a": ("F32", [2], [])},
}


def hostile_safetensors(header: Any) -> bytes:
    if isinstance(header, tuple):
        length, text = header
        return struct.pack("<Q", length) + text + bytes(64)
    entries = {
        name: {"dtype": kind, "shape": shape, "data_offsets": offsets}
        for name, (kind, shape, offsets) in header.items()
    }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(20 if len(header) > 1 else 8)


def signed(folder: Path, tensors: bytes, facts: bytes) -> Path:
    """A checkpoint with hostile content and digests that are right."""
    folder.mkdir(exist_ok=True)
    digests = {}
    for name, data in (("state.safetensors", tensors), ("state.json", facts)):
        (folder / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(digests))
    return folder


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, kind: str) -> None:
    data = hostile_safetensors(HEADERS[kind])
    (tmp_path / "student.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="can't be read"):
        read_weights(tmp_path / "student.safetensors")
    with pytest.raises(UserError, match="can't be read"):
        load_checkpoint(signed(tmp_path / "last-1", data, b"{}"))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Digests are right, so that the readers behind them see it all."""
    good = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0)}, {"model": "resnet8"})
    at = data.draw(st.integers(0, len(good) - 1))
    rest = data.draw(st.binary(max_size=12))
    facts = data.draw(st.one_of(st.binary(max_size=30), st.just(b"{}"), st.just(b"[" * 100_000)))
    changed = good[:at] + rest + good[at + data.draw(st.integers(0, 12)) :]
    folder = signed(tmp_path / "last-1", changed, facts)
    try:
        tensors, found = load_checkpoint(folder)
    except UserError:
        return
    assert isinstance(found, dict)
    assert all(isinstance(value.sum().item(), (int, float, bool)) for value in tensors.values())


@pytest.mark.parametrize(
    "facts",
    [{}, {"recipe": 5}, {"recipe": {"name": "x"}}, {"recipe": SMALL.to_json()}],
    ids=["nothing", "no recipe", "half a recipe", "no classes"],
)
def test_a_whole_checkpoint_of_nobody(tmp_path: Path, facts: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "last-1", {"x": torch.zeros(1)}, facts)
    for reader in (read_weights, lambda path: evaluate(path, options=RunOptions(**QUICK))):
        with pytest.raises(UserError):
            reader(tmp_path / "last-1")


class TestPaths:
    """Nothing is read or written outside the folder that was named."""

    @pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x.png", "a\0b.png"])
    def test_of_a_manifest(self, tmp_path: Path, path: str) -> None:
        entry = Entry("train", path, 0, 4, 4, 10, "")
        manifest = Manifest(tmp_path, ("a", "b"), (0.5,) * 3, (0.2,) * 3, (entry,))
        write_manifest(manifest, tmp_path)
        with pytest.raises(UserError, match="leads out of the folder"):
            read_manifest(tmp_path)

    @pytest.mark.parametrize("field", ["name", "teacher", "method", "model", "dataset", "sharing"])
    @pytest.mark.parametrize("value", ["../../x", "/tmp/x", "..", "a\\..\\b"])
    def test_of_a_recipe(self, field: str, value: str) -> None:
        values = {**SMALL.to_json(), field: value}
        try:
            found = Recipe.from_json(values)
        except UserError:
            return
        assert field in ("name", "teacher")
        path = run_path(found, RunOptions())
        assert path.parent == Path("runs")
        assert ".." not in path.parts

    @pytest.mark.parametrize("linked", [".", "checkpoints", "metrics.jsonl", "checkpoints/last"])
    def test_a_link_in_a_run_is_not_written_through(self, tmp_path: Path, linked: str) -> None:
        out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        train(SMALL, RunOptions(**QUICK), out=out, max_steps=1)
        if linked == "checkpoints/last":
            (place,) = (out / "checkpoints").glob("last-*")
        else:
            place = out / linked
        os.rename(place, elsewhere)
        place.symlink_to(elsewhere)
        before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
        with pytest.raises(UserError, match="is a symbolic link to"):
            train(SMALL, RunOptions(**QUICK), out=out, resume=True)
        assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before

    def test_a_new_run_is_not_made_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="is a symbolic link to"):
            RunFolder.claim(SMALL, RunOptions(out=tmp_path / "run"))

    def test_folders_above_may_be_links(self, tmp_path: Path) -> None:
        """People keep their runs on another disk."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "runs").symlink_to(tmp_path / "disk")
        RunFolder.claim(SMALL, RunOptions(out=tmp_path / "runs" / "one"))
