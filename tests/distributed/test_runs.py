"""Runs on two processes: what is written, what comes back, what stops them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import checks
from tests.distributed.checks import small
from tests.distributed.pool import Pool

# A process that a test starts has all of them.
pytestmark = pytest.mark.usefixtures("all_digits")

RECIPE = small(
    "okddip-branch",
    **{"batch_size": 100, "epochs": 2, "schedule": "cosine", "schedule_by": "step", "mixup": 0.4},
    **{"frozen_stages": 1, "frozen_epochs": 1, "swa": True, "average_norms": "recomputed"},
)


@pytest.fixture(scope="module")
def whole(two: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return two.run(checks.run, RECIPE, out, {}), out


def test_one_rank_writes_and_all_know(whole: Any) -> None:
    (first, second), out = whole
    assert first["metrics"] == second["metrics"]
    assert len(first["metrics"]) == 2
    assert sorted(first["checkpoints"]) == ["last-000000005", "last-000000010"]
    begun = json.loads((out / "environment.json").read_text())
    assert (begun["ranks"], begun["device"]) == (2, "cpu")
    assert (out / "student.safetensors").is_file()


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.proof)])
def test_resumed_is_uninterrupted(two: Pool, whole: Any, tmp_path: Path, stop: int) -> None:
    """Within an epoch and between two: the same bits, of the metrics too."""
    two.run(checks.run, RECIPE, tmp_path / "run", {"max_steps": stop})
    again = two.run(checks.run, RECIPE, tmp_path / "run", {"resume": True})[0]
    expected = whole[0][0]
    assert again["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        assert torch.equal(again["tensors"][name], value), name
    for ours, theirs in zip(again["metrics"], expected["metrics"], strict=True):
        assert ours["train"] == theirs["train"]
        assert ours["test"] == theirs["test"]


def test_resumed_on_another_number_of_ranks(two: Pool, whole: Any, tmp_path: Path) -> None:
    """Two and then one, one and then two: the epoch is whole, the bits are others."""
    two.run(checks.run, RECIPE, tmp_path / "run", {"max_steps": 3})
    alone = checks.run(RECIPE, tmp_path / "run", {"resume": True, "max_steps": 8})
    assert alone["facts"]["ranks"] == [1, 1]
    again = two.run(checks.run, RECIPE, tmp_path / "run", {"resume": True})[0]
    expected = whole[0][0]
    assert [row["step"] for row in again["metrics"]] == [5, 10]
    for ours, theirs in zip(again["metrics"], expected["metrics"], strict=True):
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=0.2)
    assert again["facts"]["ranks"] == [2, 1]


def test_what_one_rank_refuses_all_refuse(two: Pool, whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole[1], tmp_path / "run")
    (said, other) = two.run(checks.run_refusal, RECIPE, tmp_path / "run", {})
    assert "never overwritten" in said
    assert said == other


def test_a_wish_of_one_rank_stops_all_at_one_step(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(checks.stopped, RECIPE, tmp_path / "run")
    assert first == second
    assert first["signal"] == "SIGTERM"
    assert 2 <= first["step"] <= 4
