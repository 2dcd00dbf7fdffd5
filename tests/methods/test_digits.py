"""Methods train three epochs on a hundred digits, by its recipe and the command's own path."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastokd.methods import list_methods, method_class
from fastokd.recipe.names import recipe
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.train import train

QUICK = RunOptions(device="cpu", precision="fp32", engine="loop", eval_every=3, quiet=True)
# FFSD's epochs are in test_ffsd.py; baseline's are the teacher's; three ablations are another's class
# with other scores.
ELSEWHERE = ("ffsd", "baseline", "okddip_entropy", "okddip_mean", "okddip_symmetric")
NAMES = [name for name in list_methods() if name not in ELSEWHERE]
# One student of a teacher, without a diagnostic.
TAUGHT = ("kd", "dkd", "dist")
TARGETS = ("naive", "linear", "min_logit", "general")


def run(name: str, out: Path, students: int, teacher: Path | None = None, **options: Any) -> Run:
    resolved = recipe(
        f"{name}/resnet8/digits",
        **{"epochs": 3, "batch_size": 13, "students": students, "method_options": options},
    )
    return train(resolved, QUICK, out=out, teacher=teacher)


def check(done: Run) -> None:
    """Three epochs, finite terms, a loss that falls, students better than before and than guessing."""
    assert [row["epoch"] for row in done.metrics] == [0, 1, 2]
    assert [row["step"] for row in done.metrics] == [8, 16, 24]
    first, _, last = (row["train"] for row in done.metrics)
    assert sum(last["ce_S"]) < sum(first["ce_S"])
    for row in done.metrics:
        terms = [row["train"]["loss"], *row["train"]["ce_S"], *row["train"].get("kd_S", [])]
        assert all(math.isfinite(term) and term >= -1e-6 for term in terms)
    # Of training: 24 steps are too few for running statistics to serve the test images.
    assert last["mean_top1"] > max(first["mean_top1"], 0.15)
    assert (done.last["test"]["leader_top1"] is not None) == done.recipe.has_leader
    assert (done.folder / "student.safetensors").is_file()
    assert (done.folder / "report.html").is_file()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("baseline", tmp_path_factory.mktemp("teacher") / "run", 1)


def test_the_baseline_trains(teacher: Run) -> None:
    check(teacher)
    assert teacher.last["test"]["diversity"] is None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kdcl"])
def test_it_trains(name: str, teacher: Run, tmp_path: Path) -> None:
    needs = method_class(name).needs
    form = "" if name in ("ind", "cl_ilr", "one", "dml", "okdph", *TAUGHT) else "-branch"
    students = 1 if name in TAUGHT else 3
    taught = teacher.folder if needs.teacher else None
    # The teacher has learnt as long, and these weigh it more than the labels.
    options = {"kd_weight": 0.1} if name in ("dkd", "dist") else {}
    done = run(f"{name}{form}", tmp_path / "run", students, taught, **options)
    check(done)
    if students > 1:
        assert done.last["test"]["diversity"] > 0
    if name not in ("ind", "dml", "mcl", "okdph", "pcl", "okddip_random", *TAUGHT):
        attention = done.last["test"].get("attention")
        assert (attention is not None) == (name != "cl_ilr")
        for row in attention or []:
            assert sum(row) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_kdcl_trains(target: str, tmp_path: Path) -> None:
    check(run("kdcl", tmp_path / "run", 2, target=target))


def test_a_mixed_cohort_trains(tmp_path: Path) -> None:
    resolved = recipe("okddip-network/resnet8+wrn_16_2+resnet8/digits", epochs=2, batch_size=13)
    done = train(resolved, QUICK, out=tmp_path / "run", max_steps=2)
    assert done.last["train"]["kd_S"][0] >= 0
    assert done.last["test"]["leader_top1"] is not None
