"""The command under torchrun: it joins, trains, and ends as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastokd.checkpoint import list_checkpoints, newest_checkpoint
from fastokd.distributed.launch import joined, launched
from fastokd.errors import UserError

# A process that a test starts has all of them.
pytestmark = pytest.mark.usefixtures("all_digits")


@pytest.mark.parametrize(
    ("inherited", "says"),
    [
        ("WORLD_SIZE=two", "WORLD_SIZE is 'two' in the environment: start several processes by"),
        ("WORLD_SIZE=0", "WORLD_SIZE is '0' in the environment"),
        (
            "WORLD_SIZE=2",
            "WORLD_SIZE is 2 in the environment, but RANK is not set: start by torchrun",
        ),
        ("WORLD_SIZE=2 RANK=2", "but RANK is '2'"),
        ("WORLD_SIZE=2 RANK=", "but RANK is ''"),
        ("WORLD_SIZE=2 RANK=0", "but MASTER_ADDR is not set"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost", "but MASTER_PORT is not set"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=x", "but MASTER_PORT is 'x'"),
    ],
)
def test_a_part_of_a_launch_is_refused(
    inherited: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell inherits it that a launcher, or a notebook, left."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in inherited.split():
        monkeypatch.setenv(*word.split("=", 1))
    with pytest.raises(UserError, match=f"{says}.*`unset WORLD_SIZE` for one"), joined("cpu"):
        pass


def test_an_empty_world_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    with joined("cpu"):
        assert launched() == 1


def torchrun(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes of ``fastokd train`` on the CPU."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "fastokd", "train", "dml/resnet8/digits", "--students", "2", "--batch-size", "100"),
        *("--out", str(out), "--device", "cpu", "--engine", "loop", "--impl", "torch"),
        *("--precision", "fp32", *arguments),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_one_ranks_error_ends_all_with_its_message(tmp_path: Path) -> None:
    """Gloo alone would wait an hour for the rank that is gone."""
    process = torchrun(tmp_path / "run", "--method", "tests.distributed.failing:Failing")
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("the disk of this machine is on fire (reported by rank 1 of 2)") == 1
    assert "2 ranks: 2 x 50 images, batch 100" in out
    assert "Traceback" not in errors.split("torch/distributed")[0]


@pytest.mark.proof
def test_a_signal_stops_both_ranks_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM to torchrun, which hands it on; then the same command with --resume."""
    run = tmp_path / "run"
    process = torchrun(run, "--epochs", "200", "--eval-every", "200", "--save-every-steps", "3")
    while not list_checkpoints(run / "checkpoints"):  # both ranks listen
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopped by SIGTERM; `fastokd train --resume DIR`") == 1
    step = newest_checkpoint(run / "checkpoints")[2]["step"]
    assert step > 0
    again = torchrun(run, "--epochs", "200", "--resume", "--max-steps", str(step + 2))
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "the run is in" in out
    assert newest_checkpoint(run / "checkpoints")[2]["step"] == step + 2
