"""The order of all tables' runs, what fits a budget, and the hours that it is planned with. Nothing is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.reproduce.all_tables import TABLES
from fastokd.reproduce.order import (
    Comparison,
    Job,
    comparisons,
    fit,
    in_hours,
    in_order,
)
from fastokd.reproduce.speeds import FILE, Speeds, flops_per_image, images_of, work_class
from fastokd.reproduce.standing import Standing
from fastokd.reproduce.wanted import Request
from fastokd.run.durations import seconds_of

HERE = "a GPU, bf16"


def test_the_tables_share_their_runs() -> None:
    """131 cells need 111 runs of one seed: Table 4's are those of Tables 2 and 5, and so on."""
    found, trainings = comparisons([Request(table, (0,)) for table in TABLES])
    assert len(trainings) == 111
    assert {name for one in found for name in one.folders()} == trainings.keys()
    assert [(c.table, c.row) for c in found if c.dataset == "imagenet"] == [
        ("table3", "resnet34"),
        ("ffsd", "resnet18"),
        ("ffsd", "resnet34"),
    ]


def test_baselines_and_teachers_come_first_and_one_teacher_teaches_all_seeds() -> None:
    (found,), trainings = comparisons([Request("table6", (0, 1), dataset="cifar100")])
    for names in found.runs.values():
        later = [not name.startswith("baseline") for name in names]
        assert later == sorted(later)
    teacher = "baseline-resnet110-cifar100-300epochs-seed0"
    taught = {n for n, t in trainings.items() if t.teacher}
    assert {trainings[name].teacher for name in taught} == {teacher}
    assert {name[:3] for name in taught} == {"kd-", "okd"}
    order = in_order([found], dict.fromkeys(trainings, 1.0))
    assert all(order.index(teacher) < order.index(name) for name in taught)


def test_the_comparison_with_the_least_work_left_comes_first_and_imagenet_last() -> None:
    def one(row: str, data: str, *runs: str) -> Comparison:
        return Comparison("t", row, data, {0: runs, 1: tuple(f"{run}'" for run in runs)})

    found = [
        one("large", "imagenet", "i"),
        one("slow", "cifar10", "s", "shared"),
        one("quick", "cifar10", "q", "shared"),
    ]
    work = {"i": 1.0, "s": 9.0, "q": 4.0, "shared": 5.0}
    work |= {f"{name}'": hours for name, hours in work.items()}
    assert in_order(found, work) == ["q", "shared", "q'", "shared'", "s", "s'", "i", "i'"]
    # Once its runs are done, the slow comparison needs only what it shares with the quick one.
    assert in_order(found, {**work, "s": 0.0, "s'": 0.0})[:4] == ["s", "shared", "s'", "shared'"]


def test_what_does_not_fit_is_left_out_and_later_runs_may_fit() -> None:
    jobs = [Job("a", 3.0), Job("b", 4.0), Job("c", 1.5)]
    a, b, c = fit(jobs, 5.0, 1, 5.0)
    assert (a.start, a.end) == (0.0, 3.0)
    assert b.end is None
    assert not b.part
    assert (c.start, c.end) == (3.0, 4.5)
    assert [job.start for job in fit(jobs, 5.0, 2, 5.0)] == [0.0, 0.0, 3.0]


def test_a_student_waits_for_its_teacher_or_is_left_out_with_it() -> None:
    jobs = [Job("teacher", 3.0), Job("student", 1.0, "teacher"), Job("taught", 1.0, "is done")]
    assert [job.start for job in fit(jobs, 9.0, 2, 9.0)] == [0.0, 3.0, 0.0]
    assert [job.end for job in fit(jobs, 2.0, 2, 2.0)] == [None, None, 1.0]


def test_a_run_longer_than_the_whole_budget_gets_what_is_left() -> None:
    jobs = [Job("long", 50.0), Job("next", 40.0), Job("short", 2.0)]
    long, after, short = fit(jobs, 5.0, 1, 5.0)
    assert (long.start, long.end, long.part) == (2.0, None, True)
    assert not after.part
    assert short.end == 2.0
    # It fits the budget, only not what is left of it: the next call trains it.
    (waits,) = fit([Job("a", 4.0)], 3.0, 1, 5.0)
    assert not waits.part
    (unknown,) = fit([Job("a", math.inf)], 3.0, 1, math.inf)
    assert unknown.end is None


def test_budgets() -> None:
    given = [seconds_of(text, "--budget") / 3600 for text in ("24h", "90m", "3d", "0.5h", "1w")]
    assert given == [24.0, 1.5, 72.0, 0.5, 168.0]
    for text in ("", "h", "24", "0h", "-1h", "infh", "nanh", "1y"):
        with pytest.raises(UserError, match=r"--budget is .*such as 24h"):
            seconds_of(text, "--budget")
    assert [in_hours(h) for h in (0.01, 0.5, 30, math.inf)] == [
        "36 s",
        "30 min",
        "30.0 h",
        "an unknown time",
    ]


def write_speeds(out: Path, name: str, rate: float, flops: float, machine: str = HERE) -> None:
    row = {"images_per_second": rate, "flops_per_image": flops}
    (out / FILE).write_text(json.dumps({machine: {name: row}}))


def test_hours_come_from_the_best_speed_that_is_known(tmp_path: Path) -> None:
    of, other = recipe("dml/resnet32/cifar10"), recipe("okddip-network/resnet32/cifar100")
    assert (
        work_class(of) == work_class(other) == "resnet32, 32 px, batch 128, 4 students by network"
    )
    speeds, new = Speeds(tmp_path, HERE), Standing("missing")
    assert speeds.estimate(of, new).how == "unknown"
    assert speeds.estimate(of, new).hours == math.inf
    # Twice the FLOPs an image: half as fast.
    write_speeds(tmp_path, "another class", 2000.0, flops_per_image(of) / 2)
    modelled = speeds.estimate(of, new)
    images = 300 * (50_000 + 10_000 / 3)
    assert (modelled.hours, modelled.how) == (pytest.approx(images / 1000 / 3600), "modelled")
    write_speeds(tmp_path, work_class(of), 500.0, 1.0)
    assert speeds.estimate(of, new).how == "measured"
    assert speeds.estimate(of, new).hours == pytest.approx(images / 500 / 3600)
    done = Standing("done", epochs=300, rate=400.0, machine=HERE)
    speeds.learn([(other, done), (of, Standing("begun", rate=1.0, machine="another"))])
    assert speeds.estimate(of, new).how == "alike"
    assert speeds.estimate(of, new).hours == pytest.approx(images / 400 / 3600)
    half = Standing("begun", epochs=150, rate=300.0, machine=HERE)
    assert speeds.estimate(of, half).how == "own"
    assert speeds.estimate(of, half).hours == pytest.approx(images / 2 / 300 / 3600)
    assert speeds.estimate(other, done).hours == 0.0


def test_speeds_of_another_machine_or_a_damaged_file_do_not_count(tmp_path: Path) -> None:
    of, new = recipe("baseline/resnet32/cifar10"), Standing("missing")
    write_speeds(tmp_path, work_class(of), 500.0, 1.0, "another machine")
    assert Speeds(tmp_path, HERE).estimate(of, new).how == "unknown"
    for text in ("{", "[]", '{"a GPU, bf16": 3}', '{"a GPU, bf16": {"x": {}}}'):
        (tmp_path / FILE).write_text(text)
        assert Speeds(tmp_path, HERE).estimate(of, new).how == "unknown"


def test_flops_are_those_of_the_students_and_a_teachers_forward() -> None:
    alone, kd = recipe("baseline/resnet32/cifar10"), recipe("kd/resnet32/cifar10")
    teacher = recipe("baseline/resnet110/cifar10")
    assert flops_per_image(recipe("dml/resnet32/cifar10")) == 4 * flops_per_image(alone)
    assert flops_per_image(kd) == flops_per_image(alone) + flops_per_image(teacher) / 3
    assert work_class(kd) != work_class(alone)
    assert images_of(recipe("baseline/resnet34/imagenet"), 3) == 3 * (1_281_167 + 50_000 / 3)
