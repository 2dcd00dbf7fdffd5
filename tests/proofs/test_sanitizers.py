"""AddressSanitizer and UBSan over the tests of the C++ ops, on each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastokd.ops import cpp

OPS = Path(__file__).parent.parent / "ops"
# -O1 comes last and so counts: it finds the same and compiles in half the time.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"


def library(name: str) -> str:
    """The compiler's own runtime, which must be there before Python's first allocation."""
    compiler = cpp.find_compiler()
    assert compiler is not None
    run = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.proof
def test_the_ops_are_clean_under_sanitizers(tmp_path: Path, cpp_ops: None) -> None:
    tests = sorted(
        str(path)
        for path in OPS.glob("test_*.py")
        if "cpp_ops" in path.read_text() or "cpp.ensure_built" in path.read_text()
        if path.name != "test_cpp_build.py"
    )
    assert tests
    # Its compiler and its fake tensors are not what is tested here, and are slow under it.
    deselected = "not opcheck and not compile and not interpreter"
    environment = {
        **os.environ,
        "FASTOKD_CACHE": str(tmp_path / "cache"),
        "FASTOKD_CXXFLAGS": FLAGS,
        "OMP_NUM_THREADS": "2",
    }
    # Apart, since the sanitizer would run in the compiler, too.
    build = [sys.executable, "-c", "from fastokd.ops import cpp; cpp.build()"]
    subprocess.run(build, check=True, env=environment)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", deselected, *tests],
        capture_output=True,
        text=True,
        check=False,
        env={
            **environment,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
            # Into files, since pytest captures what a process says before it dies.
            "ASAN_OPTIONS": f"detect_leaks=0,abort_on_error=0,allocator_may_return_null=1,"
            f"log_path={tmp_path}/said",
            "UBSAN_OPTIONS": f"print_stacktrace=1,log_path={tmp_path}/said",
        },
    )
    reports = [path.read_text() for path in tmp_path.glob("said*")]
    # A wrong call may ask for too much memory: the allocator refuses with a warning, and torch with an error.
    reports = [text for text in reports if "ERROR" in text or "runtime error" in text]
    said = run.stdout[-4000:] + run.stderr[-4000:] + "".join(reports)
    assert not reports, said
    assert run.returncode == 0, said
    assert "passed" in run.stdout
