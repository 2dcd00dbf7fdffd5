"""``bench/gpu_first.py`` from end to end on a CPU: every section at a tiny scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.table import SECTIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.proof
def test_the_dry_run(tmp_path: Path) -> None:
    """From a checkout alone: nothing of this process's environment says where the package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "bench" / "gpu_first.py"), "--dry-run"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["how"].startswith("dry run on a CPU")
    found = report["sections"]
    assert list(found) == [section.name for section in SECTIONS]
    for name, entry in found.items():
        assert entry["status"] == "ok", (name, entry)
        for row in entry["rows"]:
            assert "error" not in row, row
            assert row.get("finite", True), row
    for name in ("step", "capture", "ops", "rest"):
        assert found[name]["figures"]["passed"] > 0, name
    for name, programs in (("steps_resnet32", 14), ("steps_imagenet", 12)):
        rows = found[name]["rows"]
        assert len(rows) == programs
        assert {row["needs"] for row in rows if "ms" not in row} == {"a GPU"}
        assert {row["tflop"] for row in rows if row["name"].startswith("branch")} != {0.0}
    assert len(found["op_times"]["rows"]) == 27
    assert len(found["profile"]["rows"][0]["longest"]) == 30
    begun, resumed = found["train"]["rows"]
    assert begun["lines"][-1]["step"] == 6
    assert resumed["lines"][-1]["step"] == 8
    assert len(list(tmp_path.iterdir())) == 2
