"""A few kills; `make test-faults` does three hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kill import digest

ONLY = ("--only", "plain", "--only", "frozen", "--only", "swa")


@pytest.mark.proof
def test_eight_kills_lose_nothing() -> None:
    """In a process of its own: it forks, which a process with threads must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", "--kills", "8", "--seed", "1", *ONLY],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 ended otherwise" in done.stdout.splitlines()[-1]


@pytest.mark.proof
def test_two_ranks_killed_in_turn_are_started_again_and_end_alike(tmp_path: Path) -> None:
    """The second rank within a step, then the first within a write; torchrun starts both anew."""
    ends = []
    for name, kills in (("whole", 0), ("killed", 2)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", "--max-restarts", str(kills)),
                *("-m", "tests.faults.two_ranks", str(tmp_path / name), str(kills)),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("killed") == kills
        ends.append(digest(tmp_path / name))
    assert ends[0] == ends[1]
