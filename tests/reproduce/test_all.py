"""``fastokd reproduce all``: real runs on the digits, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastokd.cli import run_command
from fastokd.errors import Interrupted, UserError
from fastokd.reproduce.all_tables import Asked, everything_of, plan_of
from fastokd.reproduce.child import start
from fastokd.reproduce.everything import Everything, Place, places
from fastokd.reproduce.page import write_page
from fastokd.reproduce.speeds import Speeds
from fastokd.reproduce.standing import claimed, note_failure
from fastokd.reproduce.wanted import Request
from fastokd.reproduce.workers import train_all
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from tests.documented import commands

TINY = Request("all", (0,), dataset="digits", model="resnet8", epochs=1, only="okddip_mean")
ONE = "okddip_mean-branch-resnet8-digits-1epochs-seed0"
QUICK = RunOptions(device="cpu", engine="loop", precision="fp32", impl="torch")


def asked(
    out: Path, request: Request = TINY, options: RunOptions = QUICK, **changes: object
) -> Asked:
    return dataclasses.replace(Asked(request, out, options, None, None, False), **changes)  # type: ignore[arg-type]


def everything(out: Path, request: Request = TINY, options: RunOptions = QUICK) -> Everything:
    return everything_of(asked(out, request, options), print)


def train(of: Everything) -> None:
    train_all(of, 1.0, lambda: write_page(of))


def starts(out: Path, name: str) -> int:
    """How often a process began to train the run."""
    return (out / "logs" / f"{name}.txt").read_text().count("--- ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Two seeds of one cell, by two callers at once."""
    out = tmp_path_factory.mktemp("all") / "r"
    request = dataclasses.replace(TINY, seeds=(0, 1))
    callers = [everything(out, request) for _ in range(2)]
    threads = [threading.Thread(target=train, args=(of,)) for of in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return callers[0]


def test_two_callers_never_train_one_run_twice(trained: Everything) -> None:
    out = trained.out
    assert {one.state for one in trained.standings().values()} == {"done"}
    assert [starts(out, name) for name in trained.trainings] == [1, 1]
    for name in trained.trainings:
        assert Run.load(out / name).is_whole


def test_the_page_has_every_cell(trained: Everything) -> None:
    write_page(trained)
    facts = json.loads((trained.out / "reproduction.json").read_text())
    (cell,) = facts["cells"]
    assert (cell["table"], cell["column"], cell["state"], cell["seeds"]) == (
        "table5",
        "mean",
        "done",
        2,
    )
    seconds = [Run.load(trained.out / name).last["seconds"] for name in trained.trainings]
    assert cell["hours"] == pytest.approx(sum(seconds) / 3600)
    assert cell["hours_left"] == 0
    for suffix in ("html", "md"):
        text = (trained.out / f"reproduction.{suffix}").read_text()
        assert "2 of 2 runs done" in text
        assert "no reproduction" in text
    assert "| resnet8 | mean |" in (trained.out / "table5.md").read_text()


def test_the_plan_uses_the_real_speeds(trained: Everything) -> None:
    request = dataclasses.replace(TINY, seeds=(0, 7))
    facts, table = plan_of(everything(trained.out, request), asked(trained.out, budget="1h"))
    plans = {run["run"]: (run["plan"], run["speed"]) for run in facts["runs"]}
    assert plans == {ONE: ("done", "own"), ONE.replace("seed0", "seed7"): ("fits", "alike")}
    assert len(table.rows) == 1
    assert not (trained.out / ONE.replace("seed0", "seed7")).exists()


def test_the_budgets_end_and_a_signal_save_the_run_and_the_next_call_goes_on(
    tmp_path: Path,
) -> None:
    of = everything(tmp_path / "r", dataclasses.replace(TINY, epochs=30, batch_size=250))
    (name,) = of.trainings
    lines = tmp_path / "r" / name / "metrics.jsonl"
    rows: list[str] = []

    def after_an_epoch(act: Callable[[], None]) -> threading.Thread:
        def watch() -> None:
            while not lines.is_file() or len(lines.read_text().splitlines()) <= len(rows):
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def end_the_budget() -> None:
        of.since -= 3600

    def check() -> list[str]:
        at = of.standings()[name]
        assert (at.state, at.note) == ("begun", "")
        now = lines.read_text().splitlines()
        assert now[: at.epochs][: len(rows)] == rows[: at.epochs]
        assert len(rows) < at.epochs < 30
        return now[: at.epochs]

    watching = after_an_epoch(end_the_budget)
    train(of)
    watching.join()
    rows = check()
    of.since += 3600
    watching = after_an_epoch(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(of)
    watching.join()
    rows = check()
    train(of)
    assert of.standings()[name].state == "done"
    found = lines.read_text().splitlines()
    assert found[: len(rows)] == rows
    assert [json.loads(row)["epoch"] for row in found] == list(range(30))
    assert starts(tmp_path / "r", name) == 3
    assert not of.failed


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    of = everything(tmp_path / "r", dataclasses.replace(TINY, seeds=(0, 1)))
    bad, good = of.trainings
    (of.out / bad / "checkpoints").mkdir(parents=True)
    recipe = of.trainings[bad].entry.recipe
    other = dataclasses.replace(recipe, lr=0.25).to_json()
    (of.out / bad / "recipe.json").write_text(json.dumps(other))
    train(of)
    at = of.standings()
    assert (at[bad].state, at[good].state) == ("failed", "done")
    assert "differs in lr (0.25 there, 0.1 here)" in at[bad].note
    assert "differs in lr" in (of.out / "reproduction.html").read_text()
    assert "1 failed, 1 done" in (of.out / "reproduction.md").read_text()


def test_damaged_files_of_a_run_make_it_a_failed_one(tmp_path: Path) -> None:
    of = everything(tmp_path / "r")
    folder = of.out / ONE
    folder.mkdir()
    for name, text in (("recipe.json", "{"), ("environment.json", "[]"), ("metrics.jsonl", "\0")):
        (folder / name).write_text(text)
        assert of.standings()[ONE].state == "failed"
        write_page(of)
    (of.out / "failures").mkdir(exist_ok=True)
    (of.out / "failures" / f"{ONE}.json").write_text("{")
    assert of.standings()[ONE].state == "failed"


def test_a_killed_process_is_a_failure_with_its_signal(tmp_path: Path) -> None:
    of = everything(tmp_path / "r", dataclasses.replace(TINY, epochs=500))
    (training,) = of.trainings.values()
    log = tmp_path / "log.txt"
    made = start(training.entry.recipe, of.options_of(training), log, gpu=None, threads=1)
    assert made.process.pid is not None
    os.kill(made.process.pid, signal.SIGKILL)
    state, why = made.outcome()
    assert (state, why) == ("failed", "its process was killed by SIGKILL")
    note_failure(of.out, training.folder, why)
    assert of.standings()[training.folder].note == why


def test_a_claim_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    of = everything(tmp_path / "r")
    with claimed(of.out, ONE) as mine, claimed(of.out, ONE) as second:
        assert (mine, second) == (True, False)
        at = of.standings()[ONE]
        assert at.state == "running"
        assert f"process {os.getpid()} on " in at.note
    assert of.standings()[ONE].state == "missing"
    with claimed(of.out, ONE) as again:
        assert again


def test_missing_data_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    request = Request("all", (0,), only="baseline/resnet32")
    of = everything(tmp_path / "r", request, dataclasses.replace(QUICK, data_root=tmp_path))
    assert {one.state for one in of.standings().values()} == {"no data"}
    train(of)
    write_page(of)
    text = (of.out / "reproduction.md").read_text()
    assert "no cifar10 in" in text
    assert "no cifar100 in" in text
    assert "--download to fetch it" in text


def test_places() -> None:
    assert places(QUICK, None) == [Place(None, None)]
    assert len({place.threads for place in places(QUICK, 2)}) == 1
    with pytest.raises(UserError, match="processes is 0"):
        places(QUICK, 0)


def test_the_command(trained: Everything, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "all", "--only", "okddip_mean", "--dataset", "digits"]
    command += ["--model", "resnet8", "--epochs", "1", "--seeds", "0,1", "--out", str(trained.out)]
    command += ["--device", "cpu", "--precision", "fp32", "--engine", "loop", "--impl", "torch"]
    assert run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][ONE]["state"] == "done"
    assert run_command([*command, "--dry-run", "--budget", "1h"]) == 0
    assert "2 done" in capsys.readouterr().out
    assert run_command(command) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert starts(trained.out, ONE) == 1


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/reproduce.md, as plans."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Speeds, "measure", lambda *arguments: None)
    for command in commands("docs/reproduce.md"):
        if command.whole and command.words[2] == "all":
            flags = [] if "--dry-run" in command.words else ["--dry-run"]
            assert run_command([*command.words[1:], *flags]) == 0, command.text
