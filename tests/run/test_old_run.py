"""Runs of earlier versions live on: they resume, evaluate, report and export.

``tests/old_runs/0.1.0`` was begun by version 0.1.0, before a Learner was taken out of the Session, and
stopped in its third of four epochs:

    fastokd train okddip-branch/resnet8/digits --students 3 --epochs 4 --engine loop --precision fp32
        --ema 0.9 --clip-norm 5 --max-steps 20

Beside it are the rows that the same version wrote where nothing stopped it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastokd
from fastokd.cli import run_command
from fastokd.run.folder import Run
from fastokd.train import resume

OLD = Path(__file__).parents[1] / "old_runs/0.1.0"
END = json.loads((OLD.parent / "0.1.0-to-its-end.json").read_text())
MEASURED = ("leader_top1", "student_top1", "ensemble_top1", "ensemble_logits_top1")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def close(found: Any, written: Any) -> None:
    """Another machine's sums differ in their last bits, which training makes larger; an image more or
    less of 1,000 may then be right."""
    for name in MEASURED:
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(written[name]), rtol=0, atol=0.02, msg=name
        )


@pytest.mark.usefixtures("all_digits")
def test_it_is_evaluated_as_it_was(old: Path) -> None:
    rows = Run.load(old).metrics
    found = fastokd.evaluate(old, options=fastokd.RunOptions(precision="fp32"))
    for split in ("val", "test"):
        for name in (*MEASURED, "ema_top1"):
            assert found[split][name] == pytest.approx(rows[-1][split][name], abs=0.002), name


@pytest.mark.usefixtures("all_digits")
def test_it_is_resumed_to_the_end_that_it_would_have_had(old: Path) -> None:
    run = resume(old, quiet=True)
    assert [row["epoch"] for row in run.metrics] == [0, 1, 2, 3]
    assert run.is_whole
    for row, written in zip(run.metrics[2:], END, strict=True):
        assert (row["step"], row["lr"]) == (written["step"], written["lr"])
        assert row["train"]["loss"] == pytest.approx(written["train"]["loss"], rel=0.01)
        close(row["test"], written["test"])
        assert row["test"]["ema_top1"] == pytest.approx(written["test"]["ema_top1"], abs=0.02)


def test_it_is_reported_and_exported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(old)]) == 0
    assert (old / "report.html").is_file()
    out = old.parent / "exported"
    assert run_command(["export", str(old), "--to", "onnx", "--out", str(out)]) == 0, (
        capsys.readouterr()
    )
    assert list(out.glob("*.onnx"))
    assert "conv1.weight" in load_file(old / "student.safetensors")
