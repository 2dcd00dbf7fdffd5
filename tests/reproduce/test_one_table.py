"""A table of the papers: its runs, its text, and how it is resumed."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.cells import cells_of, tables
from fastokd.recipe.names import Recipe
from fastokd.report.statistics import welch
from fastokd.report.tables import as_rich
from fastokd.reproduce.results import Reproduction, as_table
from fastokd.reproduce.table import reproduce
from fastokd.reproduce.wanted import Request
from fastokd.run.options import RunOptions
from fastokd.run.summary import summarise
from fastokd.train import train
from tests.report.fake import FakeTrain
from tests.report.test_tables import check_latex


def rising(recipe: Recipe, epoch: int) -> float:
    """Grows with the epochs, and is best before the last; differs a little by seed."""
    peak = recipe.epochs - 2
    return 0.7 + 0.001 * min(epoch, 2 * peak - epoch) / recipe.epochs + 0.001 * recipe.seed


@pytest.fixture
def fake() -> FakeTrain:
    return FakeTrain(rising)


@pytest.mark.parametrize("table", tables())
def test_every_table_is_made(table: str, fake: FakeTrain, tmp_path: Path) -> None:
    made = reproduce(Request(table, (0,), epochs=3), tmp_path / "t", RunOptions(), fake)
    assert [result.cell for result in made.results] == cells_of(table)
    trained = [call[:2] for call in fake.calls]
    assert len(set(trained)) == len(trained)
    assert "no reproduction" in made.title
    assert "3 epochs" in made.title
    assert all(result.caveat.startswith("epochs=3 (") for result in made.results)
    assert all(result.verdict == "" for result in made.results)
    json.dumps(made.to_json())


def test_runs_at_full_length_on_the_papers_data_are_judged(fake: FakeTrain, tmp_path: Path) -> None:
    published = {cell.column: cell for cell in cells_of("table5")}
    fake.accuracy = lambda recipe, epoch: (
        1 - 0.01 * (published["mean"].mean + 0.1 * (recipe.seed - 1)) - (epoch != 150) * 0.02
    )
    request = Request("table5", (0, 1, 2))
    made = reproduce(request, tmp_path / "t", RunOptions(), fake)
    assert made.title == "table5, reproduced: cifar100, 300 epochs, 3 seeds"
    by_column = {result.cell.column: result for result in made.results}
    mean = by_column["mean"]
    assert mean.verdict == "agrees"
    assert mean.best.mean == pytest.approx(26.35)
    assert mean.last.mean == pytest.approx(28.35)
    assert mean.best.std == pytest.approx(0.1)
    assert mean.difference is not None
    assert mean.difference.value == pytest.approx(0, abs=1e-9)
    assert by_column["okddip"].verdict == "differs"
    text = printed(made)
    assert "26.35 ± 0.10" in text
    assert "The best epoch is chosen on test" in text
    assert "agrees" in text


def printed(made: Reproduction) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_rich(as_table(made)))
    return console.export_text()


def test_single_runs_are_not_judged(fake: FakeTrain, tmp_path: Path) -> None:
    full = reproduce(Request("table4", (0, 1)), tmp_path / "a", RunOptions(), fake)
    assert {result.verdict for result in full.results} == {"the paper has a single run"}
    assert all(r.difference and r.difference.interval is None for r in full.results)
    one = reproduce(Request("table5", (3,)), tmp_path / "b", RunOptions(), fake)
    assert {result.verdict for result in one.results} == {"one seed"}
    figure = reproduce(Request("figure3", (0,), only="@8"), tmp_path / "c", RunOptions(), fake)
    assert {result.verdict for result in figure.results} == {"no number published"}


def test_other_data_are_never_compared(fake: FakeTrain, tmp_path: Path) -> None:
    request = Request("table2", (0,), dataset="digits", model="resnet8", only="resnet32")
    made = reproduce(request, tmp_path / "t", RunOptions(), fake)
    assert made.title == (
        "table2 in small, no reproduction: resnet8 on digits, 60 epochs, 1 seed "
        "(the paper: cifar100, 300 epochs)"
    )
    assert all(result.difference is None for result in made.results)
    assert {result.caveat for result in made.results} == {"another task"}
    assert {recipe for recipe, _, _ in fake.calls} == {
        "baseline/resnet8/digits",
        "ind/resnet8/digits",
        "dml/resnet8/digits",
        "cl_ilr/resnet8/digits",
        "one/resnet8/digits",
        "okddip-network/resnet8/digits",
        "okddip-branch/resnet8/digits",
    }


def test_rows_name_what_was_run(fake: FakeTrain, tmp_path: Path) -> None:
    """Each once, whatever rows the paper has; on other data with the difference from baseline."""
    request = Request("table2", (0, 1), dataset="digits", model="resnet8", epochs=3)
    fake.val = True
    made = reproduce(request, tmp_path / "t", RunOptions(), fake)
    assert {result.row for result in made.results} == {"resnet8"}
    columns = [result.column for result in made.results]
    assert columns == list(dict.fromkeys(cell.column for cell in cells_of("table2")))
    text = printed(made)
    assert "resnet32" not in text
    assert "No published numbers" in text
    assert "chosen on held-out images (val)" in text
    assert "Difference from baseline" in text
    assert "difference from baseline" in [column.name for column in as_table(made).columns]
    base, dml = (next(r for r in made.results if r.column == name) for name in ("baseline", "dml"))
    assert base.from_baseline is None
    assert dml.from_baseline == welch(dml.last, base.last)
    assert dml.from_baseline is not None
    assert dml.from_baseline.interval is not None
    made = reproduce(
        Request("ffsd", (0,), dataset="digits", epochs=3, only="resnet20"),
        tmp_path / "f",
        RunOptions(),
        fake,
    )
    assert [(result.row, result.column) for result in made.results] == [("resnet20", "digits")]


def test_a_model_that_the_paper_has_is_compared_in_its_own_row(
    fake: FakeTrain, tmp_path: Path
) -> None:
    request = Request("table2", (0, 1), model="resnet110", only="dml")
    (result,) = reproduce(request, tmp_path / "t", RunOptions(), fake).results
    assert (result.cell.row, result.row, result.caveat) == ("resnet110", "resnet110", "")
    assert result.difference is not None


def test_held_out_images_make_it_no_reproduction(fake: FakeTrain, tmp_path: Path) -> None:
    fake.val = True
    made = reproduce(Request("table5", (0, 1), val=5000), tmp_path / "t", RunOptions(), fake)
    assert "cifar100 without 5000 held out" in made.title
    assert "no reproduction" in made.title
    assert {result.best_on for result in made.results} == {"val"}
    assert "The best epoch is chosen on held-out images (val)" in printed(made)
    assert {result.caveat for result in made.results} == {"val=5000 (0)"}


def test_what_a_run_has_otherwise_is_said_beside_the_cell(fake: FakeTrain, tmp_path: Path) -> None:
    request = Request("table5", (0, 1), only="okddip_mean")
    assert reproduce(request, tmp_path / "t", RunOptions(), fake).results[0].verdict != ""
    (run, _) = sorted((tmp_path / "t").glob("okddip*"))
    (run / "environment.json").write_text(json.dumps({"clip_norm": 0.9}))
    (result,) = reproduce(request, tmp_path / "t", RunOptions(clip_norm=0.9), fake).results
    assert (result.verdict, result.caveat) == ("", "clip_norm=0.9 (None)")
    with pytest.raises(UserError, match=r"--clip-norm \(0.9 there, None here\)"):
        reproduce(request, tmp_path / "t", RunOptions(), fake)


def test_a_teacher_never_sees_its_students_held_out_images(fake: FakeTrain, tmp_path: Path) -> None:
    fake.val = True
    reproduce(
        Request("table6", (1,), val=100, epochs=2, only="kd/"), tmp_path / "t", RunOptions(), fake
    )
    names = [name for name, _, _ in fake.calls]
    assert sum(name.startswith("baseline/resnet110/") for name in names) == 2
    for path in (tmp_path / "t").glob("*/recipe.json"):
        assert json.loads(path.read_text())["val"] == 100, path


def test_the_ensembles_table_shares_the_runs_of_the_students(
    fake: FakeTrain, tmp_path: Path
) -> None:
    reproduce(Request("table2", (0,), only="one/resnet32"), tmp_path / "t", RunOptions(), fake)
    made = reproduce(
        Request("table4", (0,), only="one-ensemble/resnet32"), tmp_path / "t", RunOptions(), fake
    )
    assert len(fake.calls) == 1
    (result,) = made.results
    run = next(path for path in (tmp_path / "t").iterdir() if path.is_dir())
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.last.mean == pytest.approx(100 - 100 * row["test"]["ensemble_logits_top1"])


def test_the_teacher_comes_first_and_teaches_all(fake: FakeTrain, tmp_path: Path) -> None:
    made = reproduce(
        Request("table6", (0, 1), dataset="cifar100", epochs=2), tmp_path / "t", RunOptions(), fake
    )
    assert {result.cell.row for result in made.results} == {"cifar100"}
    names = [name for name, _, _ in fake.calls]
    assert names[0] == "baseline/resnet110/cifar100"
    assert names.count("baseline/resnet110/cifar100") == 2  # both seeds, as it is a cell
    for (name, _, _), teacher in zip(fake.calls, fake.teachers, strict=True):
        needs = name.startswith(("kd/", "okddip_kd-"))
        expected = tmp_path / "t" / "baseline-resnet110-cifar100-2epochs-seed0"
        assert teacher == ((str(expected),) if needs else ())


@pytest.mark.parametrize("stop_at", [0, 1])
def test_it_goes_on_where_it_was_interrupted(stop_at: int, fake: FakeTrain, tmp_path: Path) -> None:
    request = Request("table5", (0, 1), epochs=3)
    fake.stop_after, fake.stop_at = 4, stop_at
    with pytest.raises(KeyboardInterrupt):
        reproduce(request, tmp_path / "t", RunOptions(), fake)
    index = json.loads((tmp_path / "t" / "index.json").read_text())
    assert [entry["state"] for entry in index] == ["done"] * 4 + ["wanted"]
    stopped = fake.calls[-1]
    fake.calls.clear()
    fake.stop_after = None
    made = reproduce(request, tmp_path / "t", RunOptions(), fake)
    assert fake.calls[0] == (*stopped[:2], True)
    assert len(fake.calls) == 12 - 4
    for path in (tmp_path / "t").glob("okddip*"):
        assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    fake.calls.clear()
    assert reproduce(request, tmp_path / "t", RunOptions(), fake) == made
    assert fake.calls == []


def test_a_run_of_another_recipe_is_never_mixed_in(fake: FakeTrain, tmp_path: Path) -> None:
    request = Request("table5", (0,), epochs=3, only="okddip-branch")
    reproduce(request, tmp_path / "t", RunOptions(), fake)
    (path,) = (tmp_path / "t").glob("okddip*/recipe.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "lr": 0.2}))
    with pytest.raises(UserError, match=r"differs in lr \(0.2 there, 0.1 here\)"):
        reproduce(request, tmp_path / "t", RunOptions(), fake)


def test_the_best_epoch_of_a_validation_split_is_scored_on_test(
    fake: FakeTrain, tmp_path: Path
) -> None:
    from fastokd.recipe.names import recipe

    r = recipe("dml/resnet8/digits", epochs=3)
    run = fake(r, RunOptions(out=tmp_path / "run"))
    rows = [
        {**row, "val": {"mean_top1": val}, "test": {"mean_top1": test}}
        for row, val, test in zip(run.metrics, (0.5, 0.9, 0.8), (0.3, 0.6, 0.7), strict=True)
    ]
    summary = summarise(dataclasses.replace(run, metrics=rows))
    assert (summary.best, summary.best_epoch, summary.best_on) == (0.6, 2, "val")
    assert (summary.last, summary.last_epoch) == (0.7, 3)
    for row in rows:
        del row["val"]
    summary = summarise(dataclasses.replace(run, metrics=rows))
    assert (summary.best, summary.best_epoch, summary.best_on) == (0.7, 3, "test")
    with pytest.raises(UserError, match="no measured epoch"):
        summarise(dataclasses.replace(run, metrics=[]))


def test_bad_requests_are_named(tmp_path: Path) -> None:
    for request, says in (
        (Request("table9"), "did you mean"),
        (Request("table2", only="resnet99"), "leaves no cell of table2"),
        (Request("table3", (0,)), "imagenet needs to know where its files are"),
        (Request("table2", (0,), dataset="cifar1000"), "did you mean"),
        (Request("table2", (0,), epochs=0), "epochs is 0"),
    ):
        with pytest.raises(UserError, match=says):
            reproduce(request, tmp_path / "t", RunOptions(quiet=True), train)


def test_the_command_trains_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No fake: one step of real training, then the same table without training."""
    command = ["reproduce", "table5", "--only", "okddip_mean", "--dataset", "digits"]
    command += ["--model", "resnet8", "--seeds", "0", "--max-steps", "1"]
    command += ["--out", str(tmp_path / "t"), "--device", "cpu", "--engine", "loop"]
    assert run_command([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["title"].endswith("stopped after 1 step")
    (cell,) = made["cells"]
    assert cell["recipe"] == "okddip_mean-branch/resnet8/digits"
    assert 0 < cell["best"]["mean"] <= 100
    checkpoints = sorted((tmp_path / "t").glob("*/checkpoints/*"))
    changed = [path.stat().st_mtime_ns for path in checkpoints]
    assert run_command(command) == 0
    printed = capsys.readouterr().out
    assert "no reproduction" in printed
    assert f"the table is in {tmp_path}/t/table5.md, .tex and .csv" in printed
    check_latex((tmp_path / "t/table5.tex").read_text())
    assert "resnet8,mean," in (tmp_path / "t/table5.csv").read_text()
    assert "| resnet8 | mean |" in (tmp_path / "t/table5.md").read_text()
    assert [path.stat().st_mtime_ns for path in checkpoints] == changed
