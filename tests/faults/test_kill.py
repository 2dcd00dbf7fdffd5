"""A few kills; `make test-faults` does three hundred."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.proof
def test_eight_kills_lose_nothing() -> None:
    """In a process of its own: it forks, which a process with threads must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", "--kills", "8", "--seed", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 ended otherwise" in done.stdout.splitlines()[-1]
