"""Tables for papers: what is written, in which formats, and the difference from baseline."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.report.find import find_runs
from fastokd.report.page import report
from fastokd.report.pools import pool_runs
from fastokd.report.results import baseline_of, results_table
from fastokd.report.statistics import Difference, Sample, welch
from fastokd.report.tables import Column, Table, as_csv, as_latex, as_markdown
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from tests.report.fake import FakeTrain
from tests.report.test_page import make

MADE = Table(
    "t",
    "Top & bottom",
    (
        Column("name", text=True),
        Column("folder", text=True, aside=True),
        Column("last", "test (%)"),
        Column("difference", "test (%)", digits=1),
        Column("runs"),
        Column("nothing"),
    ),
    (
        ("a_b|c", "runs/a", Sample(98.004, 0.1, 2), Difference(-0.25, (-1.0, 0.5)), 2, None),
        ("[x] 5%", "runs/b", Sample(97.0, None, 1), Difference(0.5, None), 1000, None),
    ),
    ("Mean ± deviation.",),
)


def test_markdown_has_every_column() -> None:
    assert as_markdown(MADE).splitlines() == [
        r"## Top \& bottom",
        "",
        "| name | folder | test (%), last | test (%), difference | runs | nothing |",
        "| :--- | :--- | ---: | ---: | ---: | ---: |",
        r"| a\_b\|c | runs/a | 98.00 ± 0.10 | -0.2 [-1.0, +0.5] | 2 |  |",
        r"| \[x\] 5% | runs/b | 97.00 | +0.5 | 1,000 |  |",
        "",
        "Mean ± deviation.",
    ]


def test_latex_is_in_the_style_of_booktabs() -> None:
    assert as_latex(MADE).splitlines() == [
        r"% needs \usepackage{booktabs} in the preamble",
        r"\begin{table}",
        r"\centering",
        r"\caption{Top \& bottom. Mean $\pm$ deviation.}",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"\multicolumn{1}{c}{} & \multicolumn{2}{c}{test (\%)} & \multicolumn{1}{c}{} \\",
        r"\cmidrule(lr){2-3}",
        r"name & last & difference & runs \\",
        r"\midrule",
        r"a\_b\textbar{}c & $98.00 \pm 0.10$ & $-0.2 [-1.0, +0.5]$ & 2 \\",
        r"{[}x{]} 5\% & $97.00$ & $+0.5$ & 1,000 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_a_csv_has_numbers_in_columns_of_their_own() -> None:
    rows = list(csv.DictReader(as_csv(MADE).splitlines()))
    assert rows[0]["test (%), last"] == "98.004"
    assert rows[0]["test (%), last, std"] == "0.1"
    assert rows[0]["test (%), difference, low"] == "-1.0"
    assert (rows[1]["test (%), last, std"], rows[1]["test (%), difference, low"]) == ("", "")
    assert (rows[1]["runs"], rows[1]["name"]) == ("1000", "[x] 5%")


def check_latex(text: str) -> None:
    """Environments are balanced, and every row has as many cells as the table has columns."""
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert opened == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    plain = re.sub(r"\\[&%$#_{}]", "", text)
    assert plain.count("$") % 2 == 0
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"[±_^~#|<>]", re.sub(r"\\\w+", "", plain))
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    rows = [line for line in plain.splitlines() if line.endswith(r"\\")]
    for row in rows:
        spans = sum(map(int, re.findall(r"\\multicolumn\{(\d+)\}", row)))
        assert (spans or row.count("&") + 1) == len(columns), row


def trained(folder: Path, name: str, top1: float, *seeds: int, **changes: object) -> None:
    """Runs whose accuracies differ by 0.1 points from seed to seed."""
    fake = FakeTrain(lambda of, _: top1 + of.seed / 1000, val=bool(changes.pop("on_val", False)))
    for seed in seeds:
        out = folder / f"{name.replace('/', '-')}-seed{seed}"
        fake(recipe(name, seed=seed, epochs=2, **changes), RunOptions(out=out))


def test_each_cohort_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    trained(tmp_path / "a", "baseline/resnet8/digits", 0.7, 0, 1, 2)
    trained(tmp_path / "b", "baseline/resnet8/digits", 0.1, 0, 1, 2, lr=0.05)
    trained(tmp_path, "baseline/resnet20/digits", 0.2, 0, 1)
    trained(tmp_path, "okddip-branch/resnet8/digits", 0.75, 0, 1, 2)
    trained(tmp_path, "dml/resnet8/digits", 0.72, 0)
    trained(tmp_path, "dml/resnet32/digits", 0.3, 0, 1)
    pools = pool_runs(find_runs([tmp_path]))
    by_name = {pool.label: pool for pool in pools}
    found = {
        label: base and base.label
        for label, base in ((label, baseline_of(pool, pools)) for label, pool in by_name.items())
        if base
    }
    assert found == {
        "okddip-branch/resnet8/digits epochs=2": "baseline/resnet8/digits epochs=2 lr=0.1",
        "dml/resnet8/digits epochs=2": "baseline/resnet8/digits epochs=2 lr=0.1",
    }
    table = results_table(pools)
    at = [column.name for column in table.columns].index("difference from baseline")
    cells = {row[0]: row[at] for row in table.rows}
    ours, alone = Sample.of([75.0, 75.1, 75.2]), Sample.of([70.0, 70.1, 70.2])
    text = str(welch(ours, alone))
    assert text.startswith("+5.00 [")
    assert str(cells["okddip-branch/resnet8/digits epochs=2"]) == text
    assert str(cells["dml/resnet8/digits epochs=2"]) == "+1.90"  # one seed: no interval
    assert any("a single run" in note for note in table.notes)


@pytest.mark.parametrize(
    "changes", [{"val": 100}, {"label_noise": 0.4}, {"fraction": 0.5}], ids=str
)
def test_other_training_images_are_no_baseline(tmp_path: Path, changes: dict[str, Any]) -> None:
    trained(tmp_path, "baseline/resnet8/cifar10", 0.7, 0, **changes)
    trained(tmp_path, "dml/resnet8/cifar10", 0.7, 0)
    pools = pool_runs(find_runs([tmp_path]))
    assert [baseline_of(pool, pools) for pool in pools] == [None, None]
    assert "difference from baseline" not in [c.name for c in results_table(pools).columns]


def test_each_row_names_the_split_of_its_best_epoch_and_its_folders(tmp_path: Path) -> None:
    trained(tmp_path / "sweep", "dml/resnet8/cifar10", 0.7, 0, 1, val=100, on_val=True)
    trained(tmp_path, "one/resnet8/cifar10", 0.7, 0)
    out = report([tmp_path], tmp_path / "all.html")
    rows = list(csv.DictReader((tmp_path / "all-results.csv").read_text().splitlines()))
    chosen = {row["recipe"].split("/")[0]: row["best epoch chosen on"] for row in rows}
    assert chosen == {"dml": "val", "one": "test"}
    folders = {row["recipe"].split("/")[0]: row["folder"] for row in rows}
    assert folders["dml"] == f"{tmp_path}/sweep/dml-resnet8-cifar10-seed{{0,1}}"
    assert folders["one"] == f"{tmp_path}/one-resnet8-cifar10-seed0"
    page = out.read_text()
    assert folders["dml"] in page.replace("<wbr>", "")
    assert "chosen on test, as in the papers, is biased upwards" in page
    check_latex((tmp_path / "all-results.tex").read_text())
    assert "dml/resnet8/cifar10" in (tmp_path / "all-results.md").read_text()


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    (deep,) = make(tmp_path / "runs/a/b/sweep", "dml/resnet8/digits", 0)
    (top,) = make(tmp_path / "runs", "one/resnet8/digits", 0)
    make(top / "checkpoints", "ind/resnet8/digits", 0)  # what lies in a run is no run
    (tmp_path / "runs/a/loop").symlink_to(tmp_path / "runs", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    (linked,) = make(tmp_path / "elsewhere", "cl_ilr/resnet8/digits", 0)
    (tmp_path / "runs/z").symlink_to(linked, target_is_directory=True)
    found = [os.path.realpath(run.folder) for run in find_runs([tmp_path / "runs"])]
    assert found == [str(deep), str(top), str(linked)]


def test_an_unmeasured_run_below_a_folder_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, begun = make(tmp_path, "dml/resnet8/digits", 0, 1)
    (begun / "metrics.jsonl").write_text("")
    assert [run.folder for run in find_runs([tmp_path])] == [whole]
    assert f"{begun} has no measured epoch yet and is left out" in capsys.readouterr().err
    (whole / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has a measured epoch yet"):
        find_runs([tmp_path])


def test_a_repeated_sweep_is_a_pool_of_its_own(tmp_path: Path) -> None:
    for place in ("demo", "demo-2"):
        make(tmp_path / place, "dml/resnet8/digits", 0, 1)
    pools = pool_runs(find_runs([tmp_path]))
    assert [pool.label for pool in pools] == [
        f"dml/resnet8/digits epochs=3 in {tmp_path / place}" for place in ("demo", "demo-2")
    ]
    assert [len(pool.runs) for pool in pools] == [2, 2]


def test_a_run_of_an_own_method_is_read_without_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = make(tmp_path, "okddip-branch/resnet8/digits", 0)
    (other,) = make(tmp_path / "other", "okddip-branch/resnet8/digits", 0, lr=0.05)
    for folder in (run, other):
        text = (folder / "recipe.json").read_text()
        text = text.replace('"okddip"', '"no_such_module:Own"')
        (folder / "recipe.json").write_text(text.replace('"okddip-', '"no_such_module:Own-'))
    assert run_command(["report", str(run), str(other), "-o", str(tmp_path / "own.html")]) == 0
    out = capsys.readouterr().out
    assert f"its table is in {tmp_path}/own-results.md, .tex and .csv" in out
    page = (tmp_path / "own.html").read_text()
    assert "no_such_module:Own-branch/resnet8/digits epochs=3 lr=0.05" in page
    assert "leader of 4" in page
    assert "leader from 0" in page
    assert run_command(["diff", str(run), str(other)]) == 0
    assert Run.load(run).recipe.method == "no_such_module:Own"
