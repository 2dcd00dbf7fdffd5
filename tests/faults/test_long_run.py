"""Two thousand steps leave the process as it was: memory, open files, threads; and metrics.jsonl can
be read at any moment, whatever its last line has become."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastokd.recipe.names import recipe
from fastokd.report.page import report
from fastokd.run.folder import Run, RunFolder
from fastokd.run.options import RunOptions

# The module, which the function hides.
import fastokd.train  # noqa: F401  isort: skip

loop = sys.modules["fastokd.train"]
QUICK: dict[str, Any] = {"engine": "loop", "precision": "fp32", "device": "cpu", "quiet": True}
STEPS, FIRST = 2000, 550
SMALL = dataclasses.replace(recipe("okddip-branch@2/resnet8/digits"), batch_size=10, crop_padding=0)


def held() -> tuple[int, int, int]:
    """Bytes of memory, open files, threads of this process. Pages of files aren't counted: the kernel
    drops and reads them as it likes."""
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("RssAnon:")[1].split()[0]) << 10
    return memory, len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    """Trains, and prints what was held after each epoch.

    Two evaluations, at steps 250 and 500, come before step 550: what they import and cache is there.
    """
    recipe_ = dataclasses.replace(SMALL, epochs=STEPS // 50)
    record = RunFolder.record

    def recording(folder: RunFolder, session: Any, row: dict[str, Any]) -> None:
        record(folder, session, row)
        folder.writer.wait()
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(len(lines)))
        print(json.dumps([session.step, *held()]), flush=True)

    RunFolder.record = recording  # type: ignore[method-assign]
    options = RunOptions(**QUICK, save_every_steps=25, eval_every=5, clip_norm=5.0)
    loop.train(recipe_, options, out=Path(sys.argv[1]))


@pytest.mark.proof
def test_two_thousand_steps_hold_nothing_more(tmp_path: Path) -> None:
    """In a process of its own, whose memory nobody else has touched. It gives freed memory back: what
    it would keep depends on the order in which two threads free their blocks."""
    command = [sys.executable, "-m", "tests.faults.test_long_run", str(tmp_path / "run")]
    giving = os.environ | {"FASTOKD_KEEP_MEMORY": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=giving
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert rows[-1][0] == STEPS
    settled = [row for row in rows if row[0] >= FIRST]
    _, memory, files, threads = zip(*settled, strict=True)
    print(
        f"memory {memory[0] / 2**20:.1f} to {memory[-1] / 2**20:.1f} MiB over {STEPS - FIRST} steps"
    )
    # The mean of the last ten epochs against that of the first: single readings jitter.
    first, last = sum(memory[:10]) / 10, sum(memory[-10:]) / 10
    assert abs(last - first) < 2**21, (first, last)  # 1.5 KiB a step
    assert len({*files}) == 1
    assert len({*threads}) == 1


TORN = [b'{"epoch": 1, "st', b'{"epoch": 1}', b"{", b"\xff\xfe", b'{"epoch": 1, "x": "\xc3']


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of two."""
    out = tmp_path_factory.mktemp("torn") / "run"
    small = dataclasses.replace(SMALL, epochs=2, batch_size=50)
    loop.train(small, RunOptions(**QUICK), out=out, max_steps=2)
    return out


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_not_there(run: Path, torn: bytes) -> None:
    """As a kill within a write leaves it: everything before it counts."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    rows = Run.load(run).metrics
    assert [row["epoch"] for row in rows] == [0]
    report([run])
    path.write_bytes(whole)


def test_a_run_goes_on_from_a_torn_last_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + TORN[0])
    loop.resume(run, **QUICK)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


if __name__ == "__main__":
    main()
