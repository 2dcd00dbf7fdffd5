"""`fastokd runs`: what it says of whole, unfinished, running and damaged runs, without torch."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastokd.cli import run_command
from fastokd.overview import columns
from fastokd.overview.listing import Listed, list_runs, look_at
from fastokd.recipe.names import Recipe, recipe
from fastokd.run.folder import Run
from fastokd.run.lock import FolderLock
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from tests.report.fake import FakeTrain

ROOT = Path(__file__).parents[2]


def accuracy(of: Recipe, epoch: int) -> float:
    return 0.5 + of.seed / 100 + epoch / 100


def write_run(folder: Path, name: str = "okddip-branch/resnet8/digits", **changes: Any) -> Run:
    """What a whole run of two epochs leaves; written, not trained."""
    return FakeTrain(accuracy)(recipe(name, **{"epochs": 2, **changes}), RunOptions(out=folder))


def seen(folder: Path) -> Listed:
    found = look_at(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("okddip-branch/resnet8/digits", {}),
        ("okddip-branch-ensemble/resnet8/digits", {}),
        ("dml/resnet8/digits", {}),
        ("baseline/resnet8/digits", {"seed": 3}),
        ("baseline/resnet8/digits", {"ema": 0.9}),
        ("okddip_no_two_level-network/resnet8/digits", {}),
        ("dml/resnet8/digits", {"ema": 0.9, "average_students": "all"}),
        ("pcl/resnet8/digits", {}),
    ],
)
def test_the_top_1_is_that_of_the_report(tmp_path: Path, name: str, changes: Any) -> None:
    run = write_run(tmp_path / "run", name, **changes)
    lines = tmp_path / "run/metrics.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for row in rows:
        S = len(row["test"]["student_top1"])
        row["test"]["student_top1"] = [0.1 + s / 10 for s in range(S)]
        row["test"] |= {"ema_top1": 0.91} if run.recipe.ema else {}
        row["test"] |= {"ema_mean_top1": 0.92} if run.recipe.average_students == "all" else {}
        row["test"] |= {"companion_top1": 0.93} if "pcl" in name else {}
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, found = summarise(Run.load(run.folder)), seen(run.folder)
    assert (found.top1, found.of) == (whole.last, whole.reported)
    assert (found.measured, found.epoch, found.epochs) == (whole.last_epoch, 2, 2)
    assert (found.recipe, found.seed, found.state) == (run.recipe.name, run.recipe.seed, "finished")
    sizes = [path.stat().st_size for path in run.folder.rglob("*") if path.is_file()]
    assert found.bytes == sum(sizes)


def test_states(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=4)
    lock = FolderLock(run.folder)
    lock.take()
    assert seen(run.folder).state == "running"
    lock.release()
    assert seen(run.folder).state == "finished"
    (run.folder / "student.safetensors").unlink()
    assert seen(run.folder).state == "interrupted"
    for folder in (run.folder / "checkpoints").iterdir():
        folder.rename(run.folder / f"checkpoints/.{folder.name}.tmp1")
    lines = run.folder / "metrics.jsonl"
    kept = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(kept[:3]) + kept[3][:-20])
    found = seen(run.folder)
    assert (found.state, found.epoch, found.top1) == ("interrupted", 3, 0.52), "a torn line is none"
    lines.unlink()
    found = seen(run.folder)
    assert (found.state, found.epoch, found.top1) == ("interrupted", 0, None)
    assert look_at(tmp_path / "gone") is None


def test_a_long_row_and_epochs_without_a_test_are_read_past(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=3)
    lines = run.folder / "metrics.jsonl"
    first, second, third = [json.loads(line) for line in lines.read_text().splitlines()]
    del second["test"], third["test"]
    second["note"] = "x" * 300_000
    lines.write_text("".join(json.dumps(row) + "\n" for row in (first, second, third)))
    found = seen(run.folder)
    assert (found.epoch, found.measured, found.top1) == (3, 1, 0.5)


DAMAGE = {
    "no JSON": ("recipe.json", b"{"),
    "bytes": ("recipe.json", b"\xff\xfe\x00"),
    "deep": ("recipe.json", b"[" * 100_000),
    "no object": ("recipe.json", b"[1]"),
    "another program's": ("recipe.json", b'{"title": "soup", "epochs": 3}'),
    "a word": ("recipe.json", {"epochs": "ten"}),
    "no metrics": ("metrics.jsonl", b"{}\n"),
    "half a line": ("metrics.jsonl", b'{"epoch": 0,\n'),
    "a list": ("metrics.jsonl", b"[1, 2]\n"),
    "a test that is none": ("metrics.jsonl", b'{"epoch": 0, "test": 5}\n'),
    "no accuracy": ("metrics.jsonl", b'{"epoch": 0, "test": {"mean_top1": 0.5}}\n'),
    "not a number": ("metrics.jsonl", b'{"epoch": 0, "test": {"leader_top1": NaN}}\n'),
    "a pipe": ("metrics.jsonl", None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_listed_with_the_reason(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = write_run(tmp_path / "whole"), write_run(tmp_path / "damaged")
    name, content = DAMAGE[kind]
    path = run.folder / name
    if content is None:
        path.unlink()
        os.mkfifo(path)
    elif isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        path.write_bytes(content)
    found = seen(run.folder)
    assert found.state == "failed"
    assert name in (found.reason or "")
    if name == "metrics.jsonl":  # each line is read alone: its "line 1" isn't the file's
        assert "line 1" not in (found.reason or "")
    assert (found.recipe is None) == (name == "recipe.json")
    assert run_command(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{run.folder}: {name}" in out
    assert "2 runs: 1 finished, 1 failed" in out
    assert str(whole.folder) in out


def test_json_csv_and_the_table_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (2, 10, 1):
        write_run(tmp_path / f"runs/seed{seed}", "baseline/resnet8/digits", seed=seed)
    (tmp_path / "runs/seed10/student.safetensors").unlink()
    top = str(tmp_path / "runs")
    assert run_command(["runs", top, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == [1, 2, 10], "numbers in names are numbers"
    assert run_command(["runs", top, "--csv"]) == 0
    table = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    for row in (*rows, *table):
        del row["age_seconds"]
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == table
    assert run_command(["runs", top, "--sort", "-top-1", "--state", "finished,failed"]) == 0
    heading, *lines, total = capsys.readouterr().out.splitlines()
    assert heading.split() == list(columns.COLUMNS)
    assert [line.split()[2:6] for line in lines] == [
        ["2", "2/2", "0.5300", "finished"],
        ["1", "2/2", "0.5200", "finished"],
    ]
    assert total.startswith("2 runs: 2 finished; ")
    assert run_command(["runs", top, "--recipe", "dml*"]) == 0
    assert capsys.readouterr().out == "no run\n"


def test_every_column_sorts_both_ways_and_unknown_values_are_last(tmp_path: Path) -> None:
    one = seen(write_run(tmp_path / "b", seed=1).folder)
    other = replace(
        one, folder=tmp_path / "a", recipe="z", seed=0, epoch=1, top1=0.1, state="failed", bytes=1
    )
    other = replace(other, modified=one.modified + 9)
    unknown = Listed(tmp_path / "c", "running", one.modified - 9, 9**9)
    for name in columns.COLUMNS:
        there, back = (
            [run.folder.name for run in columns.in_order([one, unknown, other], sign + name)]
            for sign in ("", "-")
        )
        if name in ("recipe", "seed", "epoch", "top-1"):
            assert there[2] == back[2] == "c"
            there, back = there[:2], back[:2]
        assert there == back[::-1]
    assert columns.in_order([one, other], "top1")[0] is other


@pytest.mark.parametrize("width", [30, 44, 70, 100, 200])
def test_a_narrow_terminal_has_room_for_every_line(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = seen(write_run(tmp_path / "run").folder)
    out = io.StringIO()
    narrow = Console(file=out, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(columns, "console", lambda: narrow)
    columns.print_table([run, replace(run, folder=Path("長い名前" * 9))])
    lines = out.getvalue().splitlines()
    assert max(map(columns.cell_len, lines)) <= width
    assert ("top-1" in lines[0]) == (width >= 44)
    assert ("size" in lines[0]) == (width >= 100)
    assert "finished" in out.getvalue()


def test_each_run_once_and_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "elsewhere/run")
    (tmp_path / "runs/deep").mkdir(parents=True)
    (tmp_path / "runs/deep/link").symlink_to(tmp_path / "elsewhere/run")
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs")
    both = [tmp_path / "runs", tmp_path / "elsewhere"]
    assert [run.folder for run in list_runs(both)] == [tmp_path / "runs/deep/link"]
    assert list_runs([tmp_path / "runs"], links=False) == []
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_command(["runs"]) == 0
    assert capsys.readouterr().out == "no run\n", "there is no runs/"


def test_neither_help_nor_the_list_import_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys; from fastokd.cli import run_command\n"
        f"for words in (['runs', {str(tmp_path)!r}], ['--help'], ['watch', '--help'], "
        f"['clean', {str(tmp_path)!r}, '--all', '--dry-run']):\n"
        "    assert run_command(words) == 0\n"
        "import fastokd.overview.watch\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
