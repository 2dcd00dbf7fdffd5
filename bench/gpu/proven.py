"""Runs the tests of ``tests/gpu`` in twelve processes, as most of their time is compiling kernels.

Each process runs a share of each file's tests (``FASTOKD_SHARE``). All share one Triton cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.child import Result, tail
from fastokd.host.cpus import usable_cpus

FOLDER = Path("tests/gpu")
SHARES = 12
# A dry run takes every n-th of a section's tests.
SAMPLES = {"step": 6, "capture": 12, "ops": 60, "rest": 8}
TESTS_FAILED, NO_TESTS = 1, 5  # pytest's exit codes
ERRORS = 30


def step(result: Result) -> None:
    """One step of every method; at the same time compiles the kernels of the timed steps."""
    beside = [] if result.dry else [[sys.executable, "-m", "bench.gpu.steps"]]
    _prove(result, ["test_step*.py"], beside=beside)


def capture(result: Result) -> None:
    """Captured steps."""
    _prove(result, ["test_capture*.py"])


def ops(result: Result) -> None:
    """Every op; in a dry run a few of its tests, with Triton's interpreter."""
    if result.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    _prove(result, ["test_ops*.py"])


def rest(result: Result) -> None:
    """The tests that no other section runs."""
    known = {path for name in ("step", "capture", "ops") for path in _files([f"test_{name}*.py"])}
    others = [path.name for path in _files(["test_*.py"]) if path not in known]
    if others:
        _prove(result, others)


def _files(patterns: list[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in FOLDER.glob(pattern))


def _prove(result: Result, patterns: list[str], beside: list[list[str]] | None = None) -> None:
    """Runs the tests of some files, and the programs ``beside`` at the same time."""
    files = _files(patterns)
    if not files:
        raise FileNotFoundError(f"{FOLDER} has no {' or '.join(patterns)}")
    shares = min(2, usable_cpus()) if result.dry else SHARES
    of = shares * SAMPLES.get(result.path.stem, 1) if result.dry else shares
    # Warnings of this machine's libraries are logged, not errors.
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    tests += ["-p", "bench.gpu.outcomes", *map(str, files)]
    commands = [
        *(
            (f"share {index} of {of}", [*tests, f"--basetemp={_work(result, index)}"])
            for index in range(shares)
        ),
        *((command[-1], command) for command in beside or ()),
    ]
    running = [
        _Share(name, command, result, index, f"{index}/{of}")
        for index, (name, command) in enumerate(commands)
    ]
    seen = -1
    runs = True
    while runs:
        runs = any(share.runs() for share in running)
        noted = [line for share in running for line in share.noted()]
        if len(noted) != seen:
            seen = len(noted)
            _tell(result, noted)
        time.sleep(0.2)
    for share in running:
        code = share.process.returncode
        told = [0, NO_TESTS]
        if any(outcome["outcome"] == "failed" for outcome in share.noted()):
            told.append(TESTS_FAILED)
        if code not in told:
            said = tail(share.said.read_text(errors="replace"), 6)
            result.data["failures"].append(f"{share.name} ended with {code}: {said}")
    if not result.data["tests"] and not result.data["failures"]:
        result.data["failures"].append("no test was run")
    result.write()


def _work(result: Result, index: int) -> Path:
    return result.path.with_name(f"{result.path.stem}-{index}")


class _Share:
    """One process, its output and its outcomes."""

    def __init__(
        self, name: str, command: list[str], result: Result, index: int, share: str
    ) -> None:
        self.name = name
        work = _work(result, index)
        self.said, self.left = work.with_suffix(".txt"), work.with_suffix(".jsonl")
        environment = {
            **os.environ,
            "FASTOKD_SHARE": share,
            "FASTOKD_OUTCOMES": str(self.left),
            "OMP_NUM_THREADS": "1",
        }
        if result.dry:
            environment["FASTOKD_GPU_TESTS_ON"] = "cpu"
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    def runs(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def noted(self) -> list[dict[str, Any]]:
        """The recorded begins and ends of tests."""
        if not self.left.exists():
            return []
        whole = self.left.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]


def _tell(result: Result, noted: list[dict[str, Any]]) -> None:
    outcomes = [line for line in noted if line["outcome"] != "begun"]
    failed = [outcome for outcome in outcomes if outcome["outcome"] == "failed"]
    result.data["tests"] = {o["test"]: [o["outcome"], o["seconds"]] for o in outcomes}
    begun = dict.fromkeys(line["test"] for line in noted)
    result.data["running"] = [test for test in begun if test not in result.data["tests"]]
    result.data["failures"] = [f"{outcome['test']}: {outcome['why']}" for outcome in failed]
    result.data["errors"] = {o["test"]: o["error"] for o in failed[:ERRORS]}
    result.data["not_run"] = {
        o["test"]: o.get("error", "") for o in outcomes if o["outcome"] == "skipped"
    }
    for kind in ("passed", "failed", "skipped"):
        result.data["figures"][kind] = sum(o["outcome"] == kind for o in outcomes)
    result.write()
