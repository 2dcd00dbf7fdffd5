"""The page's parts: every number is that of the run's files, names are text, and nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fastokd.measured.answers import FILE, Answers
from fastokd.measured.cost import Cost
from fastokd.recipe.names import recipe
from fastokd.report import charts
from fastokd.report.charts import Chart, Series, as_figure, in_script, page_of
from fastokd.report.classes import classes_sections
from fastokd.report.command import command_of
from fastokd.report.curves import panels_of
from fastokd.report.headline import facts_of
from fastokd.report.live import chart_of
from fastokd.report.page import report
from fastokd.report.pools import pool_runs
from fastokd.report.statistics import interval_of, wilson
from fastokd.report.steps import cost_section
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from tests.report.fake import FakeTrain

HOSTILE = "</script><script>alert(1)</script>"


class Parsed(HTMLParser):
    """The tables of a page by their ids, as texts of cells, and its specifications and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.json: list[Any] = []
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self._rows: list[list[str]] = []
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.handlers += [name for name in values if name.startswith("on")]
        if tag == "table":
            self._rows = self.tables.setdefault(values.get("id") or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th") and self._rows:
            self._rows[-1].append("")
        elif tag == "script":
            self._script = values.get("type") or "code"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None
        elif tag == "table":
            self._rows = []

    def handle_data(self, data: str) -> None:
        if self._script == "application/json":
            self.json.append(json.loads(data))
        elif self._script:
            self.scripts.append(data)
        elif self._rows and self._rows[-1]:
            self._rows[-1][-1] += data


def made(folder: Path, name: str, *seeds: int, **changes: Any) -> list[Run]:
    """Runs whose accuracy differs from epoch to epoch and from seed to seed."""
    fake = FakeTrain(lambda recipe, epoch: 0.5 + epoch / 11 + recipe.seed / 700)
    label = name.replace("/", "-")
    return [
        fake(
            recipe(name, seed=seed, **{"epochs": 4, **changes}),
            RunOptions(out=folder / f"{label}-{seed}"),
        )
        for seed in seeds
    ]


def answers(classes: list[str], images: int, students: int = 2, step: int = 4) -> Answers:
    """Random answers of some students and their ensemble."""
    generator = torch.Generator().manual_seed(0)
    M, C = students + 1, len(classes)
    labels_N = torch.arange(images) % C
    wrong_MN = torch.rand(M, images, generator=generator) < 0.3
    other_MN = (labels_N + torch.randint(1, C, (M, images), generator=generator)) % C
    confidence_MN = torch.rand(M, images, generator=generator)
    found = Answers(
        step, labels_N, torch.where(wrong_MN, other_MN, labels_N), confidence_MN,
        (*(f"student {s}" for s in range(students)), "ensemble"), 1, tuple(classes), "fp32",
        "measured-cpu", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, 8, 3, dtype=torch.uint8),
    )  # fmt: skip
    pictured_K = torch.tensor(found.mistakes(1, 12))
    images_KHWC = torch.zeros(len(pictured_K), 8, 8, 3, dtype=torch.uint8)
    return Answers(**{**vars(found), "pictured_K": pictured_K, "images_KHWC": images_KHWC})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Answers, Parsed, str]:
    """The page of a run with answers, and its baseline beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (run,) = made(folder, "okddip-branch/resnet8/digits", 0)
    made(folder, "baseline/resnet8/digits", 0)
    found = answers([HOSTILE, *map(str, range(1, 10))], 200)
    (run.folder / FILE).write_bytes(found.to_bytes())
    page = report([run.folder]).read_text()
    return run, found, Parsed(page), page


def test_the_numbers_of_each_curve_are_those_of_the_metrics(
    one: tuple[Run, Answers, Parsed, str],
) -> None:
    run, _, parsed, _ = one
    accuracy = parsed.tables["accuracy-numbers"]
    assert accuracy[0] == ["epoch", "student 0", "student 1", "student 2", "leader", "ensemble"]
    for row, cells in zip(run.metrics, accuracy[1:], strict=True):
        test = row["test"]
        shown = [
            row["epoch"] + 1,
            *(100 * x for x in [*test["student_top1"], test["ensemble_top1"]]),
        ]
        assert list(map(float, cells)) == pytest.approx(shown, abs=5e-3)
    for name, value in (("loss", lambda row: row["train"]["loss"]), ("lr", lambda row: row["lr"])):
        cells = [float(cells[1]) for cells in parsed.tables[f"{name}-numbers"][1:]]
        assert cells == pytest.approx([value(row) for row in run.metrics], rel=1e-3)


def test_a_chart_draws_the_numbers_of_its_table(one: tuple[Run, Answers, Parsed, str]) -> None:
    run, _, parsed, _ = one
    specs = {spec["description"]: spec for spec in parsed.json if "datasets" in spec}
    loss = specs["loss on train, all students"]["datasets"]
    assert [point["mean"] for point in loss["curves"]] == pytest.approx(
        [row["train"]["loss"] for row in run.metrics], rel=1e-5
    )
    assert [point["c0"] for point in loss["epochs"]] == [
        cells[1] for cells in parsed.tables["loss-numbers"][1:]
    ]


def test_names_in_a_page_are_text_and_its_policy_allows_only_its_scripts(
    one: tuple[Run, Answers, Parsed, str],
) -> None:
    *_, parsed, page = one
    assert HOSTILE in str(parsed.tables)
    assert not any("alert(1)" in script for script in parsed.scripts)
    assert parsed.handlers == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy.group(1)
    assert "unsafe-eval" not in policy.group(1)
    allowed = re.findall(r"'sha256-([^']+)'", policy.group(1))
    assert len(allowed) == len(parsed.scripts) == 3


def test_headings_are_in_order_and_parts_have_names(one: tuple[Run, Answers, Parsed, str]) -> None:
    *_, page = one
    main = page.split("</main>")[0]
    levels = [int(level) for level in re.findall(r"<h(\d)", main)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = re.findall(r'<(?:main|section|h\d|figure|table|pre)[^>]* id="([^"]+)"', main)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'aria-labelledby="([^"]+)"', main)) <= set(ids)
    pictures = main.count('alt="test image')
    assert len(re.findall("<img", main)) == pictures == 12


def test_classes_calibration_and_mistakes_are_those_of_the_answers(
    one: tuple[Run, Answers, Parsed, str],
) -> None:
    _, found, parsed, page = one
    matrix = [[int(cell) for cell in row[1:]] for row in parsed.tables["confusion"][1:]]
    assert matrix == found.confusion_CC(1).tolist()
    accuracy_C, count_C = found.by_class(1)
    by_class = parsed.tables["by-class"][1:]
    for name, count, top1, interval in by_class:
        c = found.classes.index(name)
        assert (int(count), float(top1)) == (
            count_C[c],
            pytest.approx(100 * float(accuracy_C[c]), abs=5e-3),
        )
        bounds = wilson(float(accuracy_C[c]), int(count_C[c]))
        assert interval == "{:.1f} to {:.1f}".format(*(100 * bound for bound in bounds))
    shares = [float(row[2]) for row in by_class]
    assert shares == sorted(shares)
    assert f"(ECE) {100 * found.calibration(1).ece:.2f} points" in page
    assert re.findall(r"\(image (\d+)\)", page) == list(map(str, found.mistakes(1, 12)))
    assert sum(int(row[2]) for row in parsed.tables["calibration-numbers"][1:]) == 200


def test_the_headline_says_result_interval_baseline_speed_and_cost(
    one: tuple[Run, Answers, Parsed, str],
) -> None:
    run, _, _, page = one
    top1 = run.last["test"]["leader_top1"]
    low, high = (100 * bound for bound in wilson(top1, 200))
    assert f"{100 * top1:.2f}% [{low:.2f}, {high:.2f}]" in page
    assert "95% interval over 200 test images" in page
    assert "beside this run" in page
    assert "+0.00" in page
    assert "250.0 images/s" in page
    assert "8.0 s" in page
    assert "finished, 4 epochs" in page


def test_an_id_is_one_element_and_a_reference_has_one(
    one: tuple[Run, Answers, Parsed, str],
) -> None:
    html = re.sub(r"<script.*?</script>", "", one[3], flags=re.DOTALL)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_intervals_are_those_of_scipy(tmp_path: Path) -> None:
    for right, count in ((0, 7), (93, 100), (50, 50), (9833, 10_000)):
        theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right / count, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    (pool,) = pool_runs(made(tmp_path, "dml/resnet8/digits", 0, 1, 2))
    fact = facts_of(pool, [pool], None)[0]
    values = [100 * run.last["test"]["mean_top1"] for run in pool.runs]
    low, high = interval_of(values) or (0, 0)
    assert fact.value == f"{sum(values) / 3:.2f}% [{low:.2f}, {high:.2f}]"
    assert "Student's t" in fact.how


def test_runs_beside_it_that_are_no_baseline_are_left_out(tmp_path: Path) -> None:
    """Also two of the same seed, which are an error where they are asked for, and links."""
    for name, changes in {
        "one": {"lr": 0.05},
        "a": {"fraction": 0.5},
        "b": {"fraction": 0.5},
    }.items():
        (alone,) = made(tmp_path / "elsewhere", "baseline/resnet8/digits", 0, **changes)
        alone.folder.rename(tmp_path / name)
    (tmp_path / "linked").symlink_to(tmp_path / "one", target_is_directory=True)
    (run,) = made(tmp_path, "dml/resnet8/digits", 0)
    (pool,) = pool_runs([run])
    found = {fact.name: fact for fact in facts_of(pool, [pool], None)}
    assert "beside this run" in found["difference from the baseline"].how


def test_many_classes_have_pairs_in_place_of_a_matrix() -> None:
    found = answers([f"class {c}" for c in range(1000)], 4000)
    parsed = Parsed(html := classes_sections(found))
    assert "confusion" not in parsed.tables
    counts_CC = found.confusion_CC(1)
    for label, choice, count, _ in parsed.tables["pairs"][1:]:
        at = [int(name.split()[1]) for name in (label, choice)]
        assert int(count) == counts_CC[at[0], at[1]] > 0
    assert len(parsed.tables["by-class"]) == 21
    assert len(parsed.tables["by-class-all"]) == 1001
    assert len(html) < 400_000


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    (run,) = made(tmp_path, "dml/resnet8/digits", 0)
    run.metrics[2]["train"]["loss"] = math.nan
    pools = pool_runs([run])
    loss = panels_of(pools)[0]
    chart = chart_of(loss, "", "")
    assert chart.spec is not None
    points = json.loads(in_script(chart.spec))["datasets"]["curves"]
    assert [point["mean"] for point in points] == [2.0, 1.0, None, 0.5]
    assert "isn't finite in 1 epoch, first in epoch 3" in next(
        fact.value for fact in facts_of(pools[0], pools, None) if fact.name == "state"
    )


def test_a_command_gives_exactly_the_recipe_of_its_run(tmp_path: Path) -> None:
    changes = {"lr": 0.05, "milestones": [1, 3], "students": 3, "temperature": 2.0}
    (run,) = made(tmp_path, "okddip-branch/resnet8/digits", 7, **changes)
    assert command_of(run) == (
        "fastokd train okddip-branch/resnet8/digits --seed 7 --epochs 4 --set students=3 --set "
        "temperature=2.0 --set lr=0.05 --set 'milestones=[1, 3]'"
    )
    begun = {"clip_norm": 1.0, "precision": "bf16", "data_root": "/a b"}
    (run.folder / "environment.json").write_text(json.dumps(begun))
    said = command_of(run)
    assert said is not None
    assert said.endswith("--clip-norm 1.0 --precision bf16 --data-root '/a b'")
    (run.folder / "environment.json").write_text("{")
    assert command_of(run) is None


def test_the_parts_of_a_step_are_those_of_its_file(tmp_path: Path) -> None:
    (run,) = made(tmp_path, "dml/resnet8/digits", 0)
    seconds = {"data": 0.001, "forward": 0.02, "loss": 0.002, "backward": 0.03, "update": 0.004}
    cost = Cost(4, seconds, 8, 64, "cpu", "fp32", "loop", "measured-cpu")
    rows = Parsed(cost_section(cost, run)).tables["cost"][1:]
    assert {row[0]: float(row[1]) for row in rows} == pytest.approx(
        {name: 1e3 * value for name, value in seconds.items()}
    )
    assert sum(float(row[2]) for row in rows) == pytest.approx(100, abs=0.3)
    assert all("measured-cpu" in row[3] for row in rows)


def test_the_kept_libraries_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_: list[str] = []
    monkeypatch.setattr(charts, "cache_root", lambda: tmp_path)
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda code: made_.append(code) or "one")
    read = charts.libraries.__wrapped__
    assert [read(), read()] == ["one", "one"]
    assert len(made_) == 1
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes() + b"cut")
    assert read() == "one"
    assert len(made_) == 2


def test_a_page_without_charts_has_no_libraries() -> None:
    static = as_figure(Chart("a", "A", "what", static="<svg></svg>"))
    assert len(page_of("t", static)) < 20_000
    spec = {"mark": "bar", "data": {"values": [{"x": HOSTILE}]}}
    figure = as_figure(Chart("a", HOSTILE, HOSTILE, spec, series=[Series("a", HOSTILE, "red")] * 2))
    assert "<script>alert" not in figure
    assert Parsed(figure).json == [spec]
