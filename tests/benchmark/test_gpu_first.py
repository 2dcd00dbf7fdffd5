"""``bench/gpu_first.py`` with sections that end in every way: no other result is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_first
from bench.gpu import proven, runner
from bench.gpu.child import Result, write_whole
from bench.gpu.table import SECTIONS, Section
from fastokd.cli import run_command

ROOT = Path(__file__).parents[2]


def section(function: str, seconds: float = 20.0, quick: bool = True) -> Section:
    return Section(
        function, f"about {function}", seconds, quick, f"tests.benchmark.fake_sections:{function}"
    )


def run(out: Path, *arguments: str, table: list[Section]) -> tuple[int, dict[str, Any]]:
    code = gpu_first.main(["--dry-run", "--out", str(out), *arguments], table)
    return code, json.loads((out / "report.json").read_text())


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {name: entry["status"] for name, entry in report["sections"].items()}


def test_a_section_that_ends_badly_loses_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [section("raises"), section("killed"), section("row_fails"), section("good")]
    code, report = run(tmp_path, table=table)
    assert code == 1
    assert statuses(report) == {
        "raises": "failed",
        "killed": "failed",
        "row_fails": "failed",
        "good": "ok",
    }
    found = report["sections"]
    assert found["raises"]["rows"] == [{"name": "before", "ms": 1.0}]
    assert "this section can't go on" in found["raises"]["error"]
    assert found["killed"]["rows"] == [{"name": "first", "ms": 1.0}]
    assert "killed by SIGKILL" in found["killed"]["error"]
    large, small = found["row_fails"]["rows"]
    assert "out of memory" in large["error"]
    assert small["ms"] == 1.0
    assert found["good"]["figures"] == {"speed": 2.0}
    said = capsys.readouterr().out
    assert "speed 2" in said
    for text in (
        "this section can't go on",
        "killed by SIGKILL",
        "large: RuntimeError: out of memory",
    ):
        assert text in said
    assert "ValueError" in (tmp_path / "report.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.log"}


def test_a_section_over_its_time_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DRY_STRETCH", 1.0)
    code, report = run(tmp_path, table=[section("half", 3.0), section("good")])
    assert code == 1
    assert statuses(report) == {"half": "timeout", "good": "ok"}
    (row,) = report["sections"]["half"]["rows"]
    assert row["name"] == "first"
    assert "killed after 3 s" in report["sections"]["half"]["error"]
    _gone(row["pid"])


def _gone(pid: int) -> None:
    """Whether a process has ended, or is a zombie."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} goes on")


def test_a_section_without_time_is_skipped_and_can_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call runs failed and skipped sections; the other results stay."""
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "mark"))
    table = [
        section("good"),
        section("mends"),
        section("package", 1e6),
        section("raises", quick=False),
    ]
    code, first = run(tmp_path, "--quick", "--budget", "100", table=table)
    assert code == 1
    assert statuses(first) == {
        "good": "ok",
        "mends": "failed",
        "package": "skipped",
        "raises": "skipped",
    }
    assert "of the budget were left, and it needs 1e+06" in first["sections"]["package"]["error"]
    assert first["sections"]["raises"]["error"] == "it wasn't asked for"
    table[2] = section("package")
    code, second = run(tmp_path, "--only", "FAILED,SKIPPED", table=table)
    assert code == 1
    assert statuses(second) == {"good": "ok", "mends": "ok", "package": "ok", "raises": "failed"}
    assert second["sections"]["good"] == first["sections"]["good"]
    assert [entry["call"] for entry in second["sections"].values()] == [0, 1, 1, 1]
    assert len(second["calls"]) == 2
    assert "mixture_distillation.py" in second["sections"]["package"]["files"]


def test_a_section_is_asked_for_by_name(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--only", "good", table=[section("raises"), section("good")])
    assert code == 0
    assert statuses(report) == {"raises": "skipped", "good": "ok"}
    with pytest.raises(SystemExit, match="--only names 'gud': choose FAILED, SKIPPED or good"):
        run(tmp_path, "--only", "gud", table=[section("good")])


def test_a_former_report_is_named_or_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of the checkout is used if the folder has none; a report of another kind isn't."""
    kept = tmp_path / "kept.json"
    monkeypatch.setattr(gpu_first, "KEPT_REPORT", kept)
    with pytest.raises(SystemExit, match="needs a former report"):
        run(tmp_path, "--only", "FAILED", table=[section("good")])
    call = {"started": "2026-01-01T00:00:00Z"}
    entry = {"title": "", "status": "failed"}
    kept.write_text(
        json.dumps({"how": gpu_first.DRY, "calls": [call], "sections": {"good": entry}})
    )
    code, report = run(tmp_path, "--only", "FAILED", table=[section("good")])
    assert code == 0
    assert len(report["calls"]) == 2
    kept.write_text(json.dumps({"how": "measured-gpu", "calls": [call], "sections": {}}))
    with pytest.raises(SystemExit, match="is of another kind"):
        run(tmp_path, "--only", "FAILED", "--previous", str(kept), table=[section("good")])


def test_another_call_keeps_what_it_does_not_measure_again(tmp_path: Path) -> None:
    table = [section("good"), section("row_fails", quick=False)]
    run(tmp_path, table=table)
    code, report = run(tmp_path, "--quick", table=table)
    assert code == 0
    assert len(report["calls"]) == 2
    assert report["sections"]["row_fails"]["status"] == "failed"


def test_a_measured_report_is_not_replaced_by_a_dry_run(tmp_path: Path) -> None:
    """As if nvidia-smi isn't found in the second call."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"how": "measured-gpu", "calls": [], "sections": {}}))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="report of another kind"):
        run(tmp_path, table=[section("good")])
    assert path.read_bytes() == before
    path.write_text("[]")
    assert run(tmp_path, table=[section("good")])[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_known_outlives_the_program(tmp_path: Path, number: int) -> None:
    """A kill within a section leaves the rows so far and no running process."""
    program = (
        "import sys; from bench import gpu_first; from tests.benchmark.test_gpu_first import section;"
        "sys.exit(gpu_first.main(sys.argv[1:], [section('good'), section('half'), section('good')]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    path = tmp_path / "report.json"
    for _ in range(600):
        if path.exists() and '"pid"' in path.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(20)
    report = json.loads(path.read_text())
    assert report["sections"]["good"]["figures"] == {"speed": 2.0}
    (row,) = report["sections"]["half"]["rows"]
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert report["sections"]["half"]["status"] == "stopped"
        _gone(row["pid"])
    else:
        os.kill(row["pid"], signal.SIGKILL)


def test_the_report_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_parent_imports_no_torch() -> None:
    program = (
        "import sys, bench.gpu_first; sys.exit('torch' in sys.modules or 'fastokd' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_sections_are_functions_that_can_be_found() -> None:
    import importlib

    for entry in SECTIONS:
        module, function = entry.target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert len({entry.name for entry in SECTIONS}) == len(SECTIONS)
    assert sum(entry.seconds for entry in SECTIONS if entry.quick) <= 360


def test_bench_runs_it_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def runs(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        started.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", runs)
    path = tmp_path / "mine.json"
    assert run_command(["bench", "--gpu-report", str(path)]) == 1
    program = str(ROOT / "bench" / "gpu_first.py")
    assert started == [[sys.executable, program, "--report", str(path)]]


def test_bench_refuses_it_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fastokd.commands.bench.__file__", str(tmp_path / "fastokd/commands/bench.py")
    )
    assert run_command(["bench", "--gpu-report", str(tmp_path / "mine.json")]) == 2
    assert "in a clone of the repository" in capsys.readouterr().err


SHARED = """
import os
import pytest

def pytest_collection_modifyitems(items):
    index, count = map(int, os.environ["FASTOKD_SHARE"].split("/"))
    items[:] = items[index::count]
"""
TESTS = """
import os, time, pytest
def test_passes(): pass
def test_also(): pass
def test_fails(): assert 1 == 2, "one isn't two"
def test_skips(): pytest.skip("no second GPU")
def test_crashes(): time.sleep(0.5); os._exit(9)
"""


def test_tests_are_shared_out_and_each_outcome_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the outcomes of a process that dies; the crash itself is a failure."""
    monkeypatch.setattr(proven, "FOLDER", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "conftest.py").write_text(SHARED)
    (tmp_path / "test_step.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = Result(tmp_path / "result.json", 60, dry=True)
    proven.step(result)
    found = json.loads((tmp_path / "result.json").read_text())
    outcomes = {name.rpartition("::")[2]: outcome for name, (outcome, _) in found["tests"].items()}
    assert outcomes == {
        "test_passes": "passed",
        "test_also": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
    }
    assert found["figures"] == {"passed": 2, "failed": 1, "skipped": 1}
    failed, crashed = sorted(found["failures"], key=lambda text: "ended with 9" in text)
    assert "one isn't two" in failed
    assert "ended with 9" in crashed
    assert [name.rpartition("::")[2] for name in found["running"]] == ["test_crashes"]
    assert list(found["not_run"].values()) == ["Skipped: no second GPU"]
    with pytest.raises(FileNotFoundError, match="has no test_capture"):
        proven.capture(Result(tmp_path / "other.json", 60, dry=True))
