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
FILES = [*sorted(path.stem for path in GPU.glob("test_ops_*.py")), "test_devices"]
# A minute or more each.
LONG = ("test_ops_methods", "test_ops_max_pool", "test_ops_attention", "test_ops_fused_bn_act")
ALONE = ("test_ops_mixture_distillation", "test_ops_fusion_step", *LONG)
PROCESSES = {**{name: [name] for name in ALONE}, "others": sorted({*FILES} - {*ALONE})}


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(process, marks=[pytest.mark.proof] if process in LONG else [])
        for process in PROCESSES
    ],
)
def test_interpreted(process: str) -> None:
    files = [str(GPU / f"{name}.py") for name in PROCESSES[process]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, "every test was skipped"
