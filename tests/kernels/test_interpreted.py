"""The Triton tests of tests/gpu under Triton's interpreter, on the CPU.

Triton chooses between compiler and interpreter when a kernel is imported, so that needs a process of
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "gpu"
FILES = [*sorted(GPU.glob("test_ops_*.py")), GPU / "test_devices.py"]
# A minute or more each.
LONG = ("test_ops_methods", "test_ops_max_pool", "test_ops_attention", "test_ops_fused_bn_act")


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=[pytest.mark.proof] if file.stem in LONG else [], id=file.stem)
        for file in FILES
    ],
)
def test_interpreted(file: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, "every test was skipped"
