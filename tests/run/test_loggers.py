"""A logger that can't begin is found out before a run leaves anything; one that fails later is left."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run import loggers
from fastokd.run.loggers import still_busy
from fastokd.run.options import RunOptions
from fastokd.train import train

RECIPE = recipe("baseline/resnet8/digits", epochs=2, batch_size=100)
OPTIONS = RunOptions(quiet=True, engine="loop", precision="fp32", device="cpu", wandb=True)
WELL = """
class Run:
    def log(self, row, step): print("row", step)
    def finish(self): print("finished")
def init(**how): return Run()
"""
CANNOT_BEGIN = {
    "broken": "import no_such_package",
    "syntax": "def",
    "no key": "def init(**how): raise PermissionError('no API key configured')",
    "no network": "def init(**how): raise TimeoutError('timed out after 90 s')",
    "asks": "def init(**how): return input('your key: ')",
    "leaves": "def init(**how): raise SystemExit(1)",
    "hangs": "import threading\ndef init(**how): threading.Event().wait(1)",
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastokd.report.page.report", lambda runs, **how: None)


def install(where: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package wandb of these lines."""
    where.mkdir()
    (where / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(where)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def end_threads() -> None:
    """Those that were left, which wait for a second."""
    for thread in threading.enumerate():
        if thread.name == loggers.THREAD:
            thread.join()
    assert not still_busy()


@pytest.mark.parametrize("kind", CANNOT_BEGIN)
def test_a_logger_that_cannot_begin(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "packages", CANNOT_BEGIN[kind], monkeypatch)
    monkeypatch.setattr(loggers, "BEGIN", 0.3 if kind == "hangs" else 60)
    kept = tmp_path / "kept"
    kept.mkdir()
    asked, answers = os.pipe()  # a terminal's standard input, on which nobody answers
    with open(asked) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for out in (tmp_path / "runs/one", kept):
            with pytest.raises(UserError, match=r"Weights & Biases can't be used.*wandb login"):
                train(RECIPE, OPTIONS, out=out)
        assert sys.stdin is stdin
    os.close(answers)
    end_threads()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "packages"]
    assert not list(kept.iterdir())


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("def log(self, row, step): raise ConnectionError('reset')", "ConnectionError: reset"),
        ("def finish(self): raise OSError(28, 'No space left')", "OSError: [Errno 28] No space"),
        ("def finish(self): threading.Event().wait(1)", "it didn't end within 0.3 s"),
    ],
)
def test_a_logger_that_fails_later(
    broken: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = f"import threading\n{WELL}\nclass Broken(Run):\n    {broken}\ndef init(**how): return Broken()\n"
    install(tmp_path / "packages", stub, monkeypatch)
    monkeypatch.setattr(loggers, "END", 0.3)
    run = train(RECIPE, OPTIONS, out=tmp_path / "run", max_steps=1)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: the run continues without Weights & Biases: ")
    assert said in told
    assert "metrics.jsonl has every row" in told
    assert (run.folder / "student.safetensors").is_file()
    assert still_busy() == ("didn't end" in said)
    end_threads()


def test_a_logger_that_works_is_told_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path / "packages", WELL, monkeypatch)
    train(RECIPE, OPTIONS, out=tmp_path / "run")
    assert capsys.readouterr().out.splitlines() == ["row 1", "row 2", "finished"]


def test_no_folder_of_a_run_that_goes_on_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(RECIPE, OPTIONS, out=out, wandb=False, max_steps=1)
    before = sorted(out.rglob("*"))
    install(tmp_path / "packages", CANNOT_BEGIN["no key"], monkeypatch)
    with pytest.raises(UserError, match="no API key"):
        train(RECIPE, OPTIONS, out=out, resume=True)
    assert sorted(out.rglob("*")) == before
