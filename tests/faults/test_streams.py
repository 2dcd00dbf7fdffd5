"""Standard output goes away, a report or a display fails: the run goes on, and its student is there."""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest

from fastokd.cli import run_command
from fastokd.host.streams import Outlet
from fastokd.recipe.names import recipe
from fastokd.run.display import Display
from fastokd.run.options import RunOptions
from fastokd.train import train

OPTIONS = RunOptions(quiet=True, engine="loop", precision="fp32", device="cpu")
RECIPE = recipe("baseline/resnet8/digits", epochs=2, batch_size=100)
COMMAND = [
    *("train", "baseline/resnet8/digits", "--engine", "loop", "--device", "cpu", "--epochs", "2"),
    *("--batch-size", "100", "--precision", "fp32"),
]


@contextmanager
def closed_pipe() -> Iterator[TextIO]:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream
        abandon(stream)


@contextmanager
def dead_terminal() -> Iterator[TextIO]:
    master, slave = pty.openpty()
    stream = open(slave, "w")  # noqa: SIM115
    os.close(master)
    yield stream
    abandon(stream)


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w") as stream:
        yield stream
        abandon(stream)


def abandon(stream: TextIO) -> None:
    """What is in its buffer goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.close()


GONE = {"Broken pipe": closed_pipe, "Input/output error": dead_terminal, "No space": full_disk}


@pytest.mark.parametrize("why", GONE)
def test_a_run_goes_on_without_standard_output(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with GONE[why]() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        # The interpreter's own, which is written past its buffer.
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.setattr("fastokd.report.page.report", lambda runs, **how: None)
        assert run_command([*COMMAND, "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"warning: standard output can't be written ({why}")
    assert told[0].endswith("the run continues without it")
    assert (tmp_path / "run/student.safetensors").is_file()


@pytest.mark.parametrize("why", GONE)
def test_a_result_that_nobody_reads_ends_a_command(
    why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In silence where the reader went away, as shells have it; else the loss is an error."""
    with GONE[why]() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        for command in (["list", "models"], ["--help"]):
            code = run_command(command)
            told = capsys.readouterr().err
            if why == "Broken pipe":
                assert (code, told) == (141, "")
            else:
                assert code == 2
                assert told.startswith(f"fastokd: standard output can't be written: {why}")


def test_an_outlet_escapes_what_its_stream_cannot_say() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    out = Outlet(stream)
    print("± \udcff", file=out, flush=True)
    assert raw.getvalue() == b"\\xb1 \\udcff\n"
    assert out.lost is None
    stream.close()
    print("x", file=out)
    assert isinstance(out.lost, ValueError)
    assert Outlet(None).write("nobody listens") == 14


def test_what_is_written_in_parts_is_written_whole(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A system may take less than it is given, as a terminal that is stopped does."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, data[:3]))
    Outlet(sys.__stdout__).write("eleven parts of it\n")
    monkeypatch.undo()
    assert capfd.readouterr().out == "eleven parts of it\n"


def fastokd(where: Path, redirected: str, *arguments: str, **environment: str) -> Any:
    """The program in a shell of its own."""
    words = " ".join([sys.executable, "-m", "fastokd", *arguments, redirected])
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", words], cwd=where, env=env, capture_output=True, text=True, check=False
    )


def test_a_program_whose_streams_are_closed_or_cut(tmp_path: Path) -> None:
    """No file gets the number of a stream that was closed; the exit code is the run's. matplotlib
    has a notebook's backend, and no folder for its settings."""
    command = [*COMMAND, "--out", "run"]
    broken = {
        "MPLBACKEND": "module://no_such_package.backend",
        "MPLCONFIGDIR": "/proc/1/none",
    }
    done = fastokd(tmp_path, ">&- 2>&- <&-", *command, **broken)
    assert done.returncode == 0, done
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [0, 1]
    assert (tmp_path / "run/report.html").is_file()
    closed = fastokd(tmp_path, ">&-", "list", "models")
    assert (closed.returncode, closed.stderr) == (0, "")
    cut = fastokd(tmp_path, "| true; exit ${PIPESTATUS[0]}", "list", "recipes")
    assert (cut.returncode, cut.stderr) == (141, "")


def raising(error: BaseException) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


def test_a_run_without_its_report_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    errors = [ImportError("no font"), MemoryError(), KeyboardInterrupt(), SystemExit(3)]

    def report(runs: list[Path], **how: object) -> None:
        assert (runs[0] / "student.safetensors").is_file()
        raise errors.pop(0)

    monkeypatch.setattr("fastokd.report.page.report", report)
    train(RECIPE, OPTIONS, out=out, max_steps=1)
    for _ in range(3):
        importlib.import_module("fastokd.train")._report(out)
    why = f"warning: the run is done, but there is no report (`fastokd report '{out}'` makes it): "
    assert capsys.readouterr().err.splitlines() == [
        why + said
        for said in ("ImportError: no font", "MemoryError", "KeyboardInterrupt", "SystemExit: 3")
    ]


def test_a_run_without_its_display_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Display, "on_epoch", raising(RuntimeError("no colours")))
    monkeypatch.setattr("fastokd.report.page.report", lambda runs, **how: None)
    train(RECIPE, OPTIONS, out=tmp_path / "begun", max_steps=1)
    monkeypatch.setattr(Display, "__init__", raising(LookupError("TERM")))
    train(RECIPE, OPTIONS, out=tmp_path / "never begun", max_steps=1)
    assert capsys.readouterr().err == (
        "warning: the run continues without its display: RuntimeError: no colours\n"
        "warning: the run continues without its display: LookupError: TERM\n"
    )
    for name in ("begun", "never begun"):
        assert (tmp_path / name / "student.safetensors").is_file()
