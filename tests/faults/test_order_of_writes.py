"""A checkpoint's bytes are on the disk before its name is, and its name before anybody counts on it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastokd.checkpoint import (
    MANIFEST,
    link_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_durably,
)
from tests.faults.test_disk import begun, row_of, state_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the operating system, in order: what, and of which file."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def syncing(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        seen.append(("fsync", re.sub(r"(\.tmp\d+)-[0-9a-f]{8}$", r"\1", name)))
        fsync(descriptor)

    def moving(what: Any, source: Any, target: Any) -> None:
        seen.append(("rename", Path(target).name))
        what(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", lambda a, b: moving(replace, a, b))
    monkeypatch.setattr(os, "rename", lambda a, b: moving(rename, a, b))
    return seen


def of(pid_name: str) -> str:
    return f".{pid_name}.tmp{os.getpid()}"


def test_a_file_is_flushed_before_it_is_renamed(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_durably(tmp_path / "x", b"1")
    assert calls == [("fsync", of("x")), ("rename", "x"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_is_flushed_before_it_is_renamed(
    tmp_path: Path, calls: list[tuple[str, str]], there: bool
) -> None:
    if there:
        save_checkpoint(tmp_path / "last-1", {"x": torch.zeros(3)}, {})
        calls.clear()
    save_checkpoint(tmp_path / "last-1", {"x": torch.ones(3)}, {})
    files = [("fsync", name) for name in ("state.safetensors", "state.json", MANIFEST)]
    # Their names within the folder are made to last, before the folder's own.
    moves = [("rename", f".last-1.old{os.getpid()}")] if there else []
    moves.append(("rename", "last-1"))
    assert calls == [*files, ("fsync", of("last-1")), *moves, ("fsync", tmp_path.name)]


def test_an_epoch_is_flushed_with_eight_calls(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """The line, the best checkpoint, its link; an epoch that isn't the best has six."""
    folder = begun(tmp_path / "run", 3)
    synced = [name for what, name in calls if what == "fsync"][-8:]
    checkpoint = ["state.safetensors", "state.json", MANIFEST, of("best-000000003"), "checkpoints"]
    assert synced == ["metrics.jsonl", *checkpoint, of("last-000000003"), "checkpoints"]
    calls.clear()
    row = row_of(1)
    folder.record(state_of(4), {**row, "epoch": 3, "step": 4})
    folder.writer.wait()
    assert len([name for what, name in calls if what == "fsync"]) == 6


def test_a_link_to_a_checkpoint_lasts_too(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    save_checkpoint(tmp_path / "best-1", {"x": torch.zeros(3)}, {})
    calls.clear()
    link_checkpoint(tmp_path / "best-1", tmp_path / "last-1")
    assert calls == [("fsync", of("last-1")), ("rename", "last-1"), ("fsync", tmp_path.name)]


def test_an_old_checkpoint_is_removed_when_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ones, the best one, and one that another of its name replaces."""
    removed: list[str] = []
    remove = shutil.rmtree

    def removing(path: Any, *options: Any, **named: Any) -> None:
        path = Path(path)
        if (path / MANIFEST).is_file():  # else it is what a writer has left
            kind, _, old = path.name.lstrip(".").partition(".old")[0].partition("-")
            newer = [p for p in path.parent.glob(f"{kind}-*") if p != path and p.name[5:] >= old]
            assert newer, f"{path.name} is removed, and nothing is in its place"
            load_checkpoint(max(newer))
            removed.append(path.name.lstrip("."))
        remove(path, *options, **named)

    monkeypatch.setattr(shutil, "rmtree", removing)
    folder = begun(tmp_path / "run", 3)
    assert removed == ["best-000000001", "best-000000002", "last-000000001"]
    folder.save(state_of(3))
    assert removed[3].startswith("last-000000003.old")
