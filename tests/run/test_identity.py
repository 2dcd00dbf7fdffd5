"""Which run a folder holds: another is refused, one that was cut goes on, a live one is left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastokd.checkpoint import fingerprint
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.settings import WantedRun, wanted_runs
from fastokd.run.folder import Run
from fastokd.run.identity import Standing, is_done, other_teacher, standing
from fastokd.run.lock import FolderLock, alone_in
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.run.sweep import _Index, run_all, run_or_resume
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT, Weights
from fastokd.train import train

NAME = "baseline/resnet8/digits"
ALONE = recipe(NAME, epochs=1, batch_size=50)  # an epoch is two steps
OPTIONS = RunOptions(device="cpu", precision="fp32", engine="loop", quiet=True)
FLAGS = ["--device", "cpu", "--precision", "fp32", "--engine", "loop", "--quiet"]


def begun(out: Path, **changes: Any) -> Run:
    return train(ALONE, OPTIONS, out=out, **changes)


def index_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "index.json").read_text())
    return rows


def test_a_second_sweep_leaves_a_live_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that has a recipe and no checkpoint yet nothing is removed."""
    out = tmp_path / "cc"
    command = ["train", NAME, "--epochs", "1", "--seeds", "0", "--out", str(out), *FLAGS]
    with subprocess.Popen([sys.executable, "-m", "fastokd", *command]) as first:
        try:
            while not list(out.glob("*/recipe.json")):
                assert first.poll() is None
                time.sleep(0.002)
            first.send_signal(signal.SIGSTOP)
            (live,) = out.glob("*/recipe.json")
            before = live.stat().st_ino, live.stat().st_mtime_ns
            assert not list(live.parent.glob("checkpoints/*")), "stopped too late"
            assert run_command(command) == 2
            assert "another run uses" in capsys.readouterr().err
            assert (live.stat().st_ino, live.stat().st_mtime_ns) == before
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    assert (live.parent / STUDENT).is_file()
    assert [row["state"] for row in index_of(out)] == ["done"]


def test_two_sweeps_share_an_index(tmp_path: Path) -> None:
    wanted = [wanted_runs(NAME, {}, {}, seeds=[seed])[0] for seed in (0, 1, 2)]
    first, second = _Index(tmp_path / "out"), _Index(tmp_path / "out")
    for index, entry in ((first, wanted[0]), (second, wanted[1]), (first, wanted[2])):
        index.want(entry, anew=False)
    assert [row["folder"] for row in index_of(tmp_path / "out")] == [p.folder for p in wanted]
    with pytest.raises(UserError, match="stop"), first.kept_if_begun():
        raise UserError("stop")
    assert len(index_of(tmp_path / "out")) == 3, "the other's runs stay listed"


def test_an_index_that_another_sweep_writes_is_waited_for(tmp_path: Path) -> None:
    first, second = (wanted_runs(NAME, {}, {}, seeds=[seed])[0] for seed in (0, 1))
    index = _Index(tmp_path)
    index.want(first, anew=False)
    with futures.ThreadPoolExecutor() as others:
        with alone_in(tmp_path):
            wanted = others.submit(_Index(tmp_path).want, second, anew=False)
            with pytest.raises(futures.TimeoutError):
                wanted.result(0.3)
        wanted.result(30)
    assert [row["folder"] for row in index_of(tmp_path)] == [first.folder, second.folder]


def test_a_run_that_was_cut_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = ["train", NAME, "--epochs", "1", "--batch-size", "25", "--seeds", "0", *FLAGS]
    command += ["--out", str(out)]
    assert run_command([*command, "--max-steps", "3"]) == 0
    (row,) = index_of(out)
    assert row["state"] == "cut"
    folder = out / row["folder"]
    cut = (folder / STUDENT).stat().st_mtime_ns
    assert standing(folder, []) == Standing(0, 3)
    assert run_command([*command, "--max-steps", "3"]) == 0
    assert (folder / STUDENT).stat().st_mtime_ns == cut, "the same asking is done"
    with pytest.raises(UserError, match=r"max_steps is 2, but the run in .* has taken 3"):
        is_done(folder, Run.load(folder).recipe, 2)
    assert run_command([*command, "--max-steps", "2"]) == 2
    lock = FolderLock(folder)
    lock.take()
    assert run_command(command) == 2
    lock.release()
    (row,) = index_of(out)
    assert (row["state"], "last" in row) == ("wanted", False), "what it had isn't what is wanted"
    assert run_command(command) == 0
    run = Run.load(folder)
    assert run.is_whole
    assert [row["step"] for row in run.metrics] == [4]
    assert index_of(out)[0]["state"] == "done"
    assert run_command([*command, "--max-steps", "3"]) == 2, "4 steps are not 3"


def test_lines_tell_a_cut_epoch_from_a_whole_one(tmp_path: Path) -> None:
    """Of a run whose checkpoints were removed."""
    assert standing(tmp_path, [{"epoch": 0, "step": 8}, {"epoch": 1, "step": 16}]).epochs == 2
    assert standing(tmp_path, [{"epoch": 0, "step": 8}, {"epoch": 1, "step": 11}]).epochs == 1
    assert standing(tmp_path, []) == Standing(0, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip_norm": 1.0}, r"--clip-norm \(None there, 1.0 here\)"),
        ({"precision": "bf16"}, r"--precision \(fp32 there, bf16 here\)"),
        ({"accumulate": 2}, r"--accumulate \(1 there, 2 here\)"),
        ({"engine": "vmap"}, r"--engine \(loop there, vmap here\)"),
        ({"eval_every": 5}, r"--eval-every \(1 there, 5 here\)"),
        ({"overfit_batch": True}, r"--overfit-batch \(False there, True here\)"),
        ({"init": ("a.pth",)}, r"--init \(None there, a.pth here\)"),
    ],
)
def test_a_run_of_other_options_is_refused(
    changes: dict[str, Any],
    says: str,
    one_run: Path,
) -> None:
    with pytest.raises(UserError, match=f"holds another run: it differs in {says}; choose"):
        run_or_resume(ALONE, RunOptions(**{**OPTIONS.to_json(), "out": one_run, **changes}), train)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(tmp_path_factory.mktemp("one") / "run").folder


def test_an_option_that_is_left_out_is_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    begun(out, accumulate=2, clip_norm=2.0)
    options = RunOptions(**{**OPTIONS.to_json(), "out": out})
    with pytest.raises(
        UserError, match=r"--accumulate \(2 there, 1 here\), --clip-norm \(2.0 there"
    ):
        run_or_resume(ALONE, options, train)
    same = RunOptions(**{**options.to_json(), "accumulate": 2, "clip_norm": 2.0, "engine": "auto"})
    assert run_or_resume(ALONE, same, train).metrics == Run.load(out).metrics


def test_what_a_run_begins_from_is_its_contents(tmp_path: Path, one_run: Path) -> None:
    first, copy, out = (tmp_path / name for name in ("w.safetensors", "same", "run"))
    shutil.copy(one_run / STUDENT, first)
    shutil.copytree(one_run, copy)
    begun(out, init=(str(first),), max_steps=1)
    options = RunOptions(**{**OPTIONS.to_json(), "out": out, "max_steps": 1})
    for path in (first, copy):
        named = RunOptions(**{**options.to_json(), "init": (str(path),)})
        assert run_or_resume(ALONE, named, train).folder == out
    changed = {name: value + 1 for name, value in load_file(first).items()}
    save_file(changed, first)
    with pytest.raises(UserError, match=r"--init \(.*w.safetensors, as it was, there, .*w.safe"):
        run_or_resume(ALONE, RunOptions(**{**options.to_json(), "init": (str(first),)}), train)


def test_a_teacher_is_its_contents(tmp_path: Path, one_run: Path) -> None:
    taught = recipe("kd/resnet8/digits", epochs=1, batch_size=50)
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(one_run, teacher)
    options = RunOptions(**{**OPTIONS.to_json(), "out": out, "teacher": teacher})
    train(taught, options)
    assert run_or_resume(taught, options, train).is_whole
    moved = RunOptions(**{**options.to_json(), "teacher": one_run})
    assert run_or_resume(taught, moved, train).is_whole, "the same weights in another place"
    begun(tmp_path / "other", max_steps=1)
    another = RunOptions(**{**options.to_json(), "teacher": tmp_path / "other"})
    for ask in (
        lambda: run_or_resume(taught, another, train),
        lambda: train(taught, another, resume=True),
    ):
        with pytest.raises(UserError, match=r"--teacher \(.*teacher/student.* there, .*other"):
            ask()
    shutil.rmtree(teacher)
    assert train(taught, options, resume=True).is_whole, "a run has kept its own"
    kept = read_weights(out / "teacher.safetensors")
    plain = {**kept.facts, "taken_from": str(teacher / STUDENT)}  # of an earlier version
    kept.path.write_bytes(Weights(kept.path, kept.state, plain).to_bytes())
    assert other_teacher(out, [str(teacher)]) == []
    assert other_teacher(out, [str(tmp_path / "gone")]) != []


def test_a_run_that_was_stopped_before_it_was_tuned_takes_any_engine() -> None:
    how = {"engine": "auto", "compile": None, "memory_format": "auto", "accumulate": 1, "init": []}
    asked = RunOptions(engine="vmap", compile=True).as_begun(how, Path("run"))
    assert (asked.engine, asked.compile) == ("vmap", True)
    settled = {**how, "engine": "loop", "compile": False}
    with pytest.raises(UserError, match=r"--compile \(False there, True here\)"):
        RunOptions(compile=True).as_begun(settled, Path("run"))
    assert RunOptions(device="cuda").as_begun({"device": "cuda:0"}, Path("run")).device == "cuda:0"


def test_a_folder_is_refused_and_not_emptied_where_its_checkpoints_are_gone(
    tmp_path: Path, one_run: Path
) -> None:
    out = tmp_path / "out" / "run"
    shutil.copytree(one_run, out)
    shutil.rmtree(out / "checkpoints")
    options = RunOptions(**{**OPTIONS.to_json(), "out": out.parent})
    entry = WantedRun("run", ALONE, {})
    (tmp_path / "out/index.json").write_text("[]")
    (run,) = run_all(out.parent, [entry], options, train)
    assert run.is_whole, "its student and its lines are all there"
    (out / STUDENT).unlink()
    with pytest.raises(UserError, match="isn't done and has no checkpoints"):
        run_all(out.parent, [entry], options, train)
    assert (out / "metrics.jsonl").is_file()


def test_a_fingerprint_is_of_names_shapes_types_and_values() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(())}
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    others: list[dict[str, torch.Tensor]] = [
        {**base, "a": base["a"].view(2, 2)},
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"] + 1},
        {"c": base["a"], "b": base["b"]},
    ]
    assert len({fingerprint(one) for one in (base, *others)}) == 5


def test_the_best_epoch_is_the_best_checkpoints(tmp_path: Path) -> None:
    """An epoch that was cut may score more: its weights aren't kept as the best."""
    out = tmp_path / "run"
    train(replace(ALONE, epochs=2), OPTIONS, out=out, max_steps=3)
    rows = Run.load(out).metrics
    assert [row["epoch"] for row in rows] == [0, 1]
    for row, top1 in zip(rows, (0.5, 1.0), strict=True):
        for split in ("val", "test"):
            row[split] |= {"mean_top1": top1, "student_top1": [top1]}
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summarise(Run.load(out))
    score = read_weights(out, best=True).fact("score")
    assert (found.best_epoch, found.best) == (score["epoch"], score["top1"]) == (1, 0.5)
    assert (found.last_epoch, found.last) == (2, 1.0)
