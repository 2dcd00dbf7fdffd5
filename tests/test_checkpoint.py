"""Checkpoints are whole or absent, and loading runs no code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from fastokd import checkpoint
from fastokd.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from fastokd.errors import UserError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last-1", TENSORS, {"epoch": 3})
    tensors, facts = load_checkpoint(tmp_path / "last-1")
    assert facts == {"epoch": 3}
    assert tensors.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert tensors[key].dtype == value.dtype
        assert torch.equal(tensors[key], value)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_every_truncation_is_detected(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "last-1", {"a": torch.arange(4.0)}, {"epoch": 3})
    path = tmp_path / "last-1" / name
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "last-1")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "last-1", TENSORS, {})
    (tmp_path / "last-1" / name).unlink()
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path / "last-1")


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    save_checkpoint(tmp_path / "last-1", TENSORS, {})
    data = pickle.dumps(Hostile())
    folder = tmp_path / "last-1"
    import hashlib
    import json

    digests = {
        name: hashlib.sha256(data).hexdigest() for name in ("state.safetensors", "state.json")
    }
    for name in digests:
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(UserError, match="can't be read"):
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_falls_back_to_the_one_before_and_says_why(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"last-{step:03d}", TENSORS, {"step": step})
    (tmp_path / "last-002" / "state.safetensors").write_bytes(b"rot")
    path, _, facts, faults = newest_checkpoint(tmp_path)
    assert path.name == "last-001"
    assert facts == {"step": 1}
    assert "last-002" in faults[0]
    (tmp_path / "last-001" / "state.json").write_bytes(b"rot")
    with pytest.raises(UserError, match="no checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "last-1", TENSORS, {"step": 1})
    written = []

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "_write_flushed", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last-1", TENSORS, {"step": 2})
    assert load_checkpoint(tmp_path / "last-1")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last-1"]


def test_prunes_the_oldest(tmp_path: Path) -> None:
    for step in range(4):
        save_checkpoint(tmp_path / f"last-{step:03d}", TENSORS, {})
    save_checkpoint(tmp_path / "best-000", TENSORS, {})
    prune_checkpoints(tmp_path, "last", 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["last-003", "last-002"]
    assert [path.name for path in list_checkpoints(tmp_path, "best")] == ["best-000"]
