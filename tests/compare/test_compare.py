"""Two methods on few digits: the runs, how they resume, and the numbers on the page."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastokd.cli import run_command
from fastokd.compare import comparison
from fastokd.compare.comparison import Comparison, Prepared, compare, prepare
from fastokd.compare.contestants import ALONE, Request
from fastokd.compare.cost import larger_student, training_macs
from fastokd.compare.results import Against
from fastokd.compare.shared import SHARED, settings_of
from fastokd.compare.verdict import verdicts
from fastokd.errors import UserError
from fastokd.models import model_info
from fastokd.recipe.names import Recipe, recipe
from fastokd.report.statistics import Difference, Paired, interval_of, paired
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from fastokd.train import train
from tests.browser import CHROMIUM, asked

OPTIONS = RunOptions(device="cpu", precision="fp32", engine="loop", impl="torch", quiet=True)
REQUEST = Request(
    "okddip-branch,dml",
    "resnet8",
    "digits",
    (0, 1),
    {"epochs": 1, "batch_size": 25},
    students=2,
    budget="macs",
)


class Broken:
    """Trains; one run raises, and after ``most`` runs comes an interruption."""

    def __init__(self, most: int) -> None:
        self.most, self.trained = most, 0
        self.folders: list[str] = []

    def __call__(self, of: Recipe, options: RunOptions) -> Run:
        if self.trained == self.most:
            raise KeyboardInterrupt
        assert options.out is not None
        if options.out.name == "dml-network-seed1":
            raise RuntimeError("the machine is out of luck")
        self.trained += 1
        self.folders.append(options.out.name)
        return train(of, options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Comparison, Broken]:
    """Interrupted after four runs, and continued; one run fails."""
    prepared = prepare(REQUEST, tmp_path_factory.mktemp("c") / "out", OPTIONS)
    first, second = Broken(4), Broken(99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "counted_peak", lambda of, options: 10**6)  # seconds for each row
        with pytest.raises(KeyboardInterrupt):
            compare(prepared, first)
        done = compare(prepare(REQUEST, prepared.out, OPTIONS), second)
    assert not {*first.folders} & {*second.folders}
    return prepared, done, second


Made = tuple[Prepared, Comparison, Broken]


def test_every_row_has_its_runs(made: Made) -> None:
    prepared, done, _ = made
    labels = [row.label for row in prepared.rows]
    assert labels[:3] == [ALONE, "okddip-branch", "dml-network"]
    assert "one student, 2 times the epochs" in labels
    folders = {entry.run.folder for entry in prepared.entries}
    failed = {one.entry.run.folder for one in done.failures}
    assert failed == {"dml-network-seed1"}
    assert {run["folder"] for run in done.facts["runs"]} == folders - failed
    assert done.failures[0].why == "RuntimeError: the machine is out of luck"
    assert "the machine is out of luck" in (prepared.out / "comparison.html").read_text()


def test_the_numbers_are_those_of_the_runs(made: Made) -> None:
    prepared, done, _ = made
    assert json.loads((prepared.out / "comparison.json").read_text()) == json.loads(
        json.dumps(done.to_json())
    )
    kept: dict[tuple[str, int], float] = {}
    for run in done.facts["runs"]:
        loaded = Run.load(prepared.out / run["folder"])
        test = loaded.metrics[-1]["test"]
        assert run["kept_top1"] == 100 * test["student_top1"][loaded.recipe.kept_student]
        if loaded.recipe.students > 1:
            assert run["mean_top1"] == 100 * test["mean_top1"]
            assert run["ensemble_top1"] == 100 * test["ensemble_top1"]
        assert run["diversity"] == test["diversity"]
        assert run["seconds"] == sum(row["seconds"] for row in loaded.metrics)
        assert sum(run["calibration"]["count"]) == 100
        kept[run["row"], run["seed"]] = run["kept_top1"]
    rows = {row["row"]: row for row in done.facts["sections"][0]["rows"]}
    assert rows["dml-network"]["seeds"] == [0]
    assert rows["dml-network"]["against"]["images"]["p"] is None
    ours, theirs = ([kept[name, seed] for seed in (0, 1)] for name in ("okddip-branch", ALONE))
    against, expected = rows["okddip-branch"]["against"]["images"], paired(ours, theirs)
    assert against["difference"] == expected.difference.value
    assert against["interval"] == expected.difference.interval
    assert against["p"] == against["p_holm"] == expected.p  # one test is left
    # The page and the CSV show the same.
    page = (prepared.out / "comparison.html").read_text()
    table = page[page.index('id="images"') :]
    shown = re.search(r'<tr><th scope="row" class=text>okddip-branch</th>(.*?)</tr>', table)
    assert shown is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown[1])
    low, high = interval_of(ours) or (0.0, 0.0)
    mean = sum(ours) / 2
    assert cells[1].startswith(f"{mean:.2f} ± ")
    assert cells[2] == f"[{low:.2f}, {high:.2f}]"
    lines = list(csv.reader((prepared.out / "comparison.csv").read_text().splitlines()))
    (first,) = [line for line in lines if line[:1] == ["okddip-branch"]][:1]
    assert float(first[2]) == pytest.approx(mean, abs=1e-6)


def test_a_rerun_trains_only_what_failed(made: Made) -> None:
    prepared = made[0]
    again = Broken(0)
    with pytest.raises(KeyboardInterrupt):  # the failed run is begun again
        compare(prepare(REQUEST, prepared.out, OPTIONS), again)
    states = {run["folder"]: run["state"] for run in prepared.to_json()["runs"]}
    assert [name for name, state in states.items() if state != "done"] == ["dml-network-seed1"]
    with pytest.raises(UserError, match="holds another run: it differs in epochs"):
        prepare(replace(REQUEST, settings={**REQUEST.settings, "epochs": 2}), prepared.out, OPTIONS)


def test_rows_share_all_but_the_method() -> None:
    asked = replace(REQUEST, methods="ffsd,dml,okddip-network", students=3, budget="images")
    prepared = prepare(asked, Path("none"), OPTIONS)
    assert [row.kind for row in prepared.rows] == ["alone", "method", "method", "method"]
    base = prepared.rows[0].recipe
    for row in prepared.rows[1:]:
        assert row.recipe.students == 3
        assert all(getattr(row.recipe, name) == getattr(base, name) for name in SHARED)
    assert prepared.rows[1].recipe.ramp_epochs != base.ramp_epochs  # FFSD's own
    assert not prepared.out.exists()


def test_a_named_recipe_is_that_of_all_rows(tmp_path: Path) -> None:
    """With its epochs scaled and the user's settings on top; a method keeps what is its own."""
    file = tmp_path / "hot.toml"
    file.write_text(
        'recipe = "dml/resnet20/cifar100"\nschedule = "cosine"\nlabel_smoothing = 0.1\nepochs = 200\n'
    )
    settings = {"epochs": 2, "lr": 0.3, "final_lr": 0.01, "mixup": 0.2, "mix_prob": 0.5}
    asked = replace(REQUEST, methods="kd,okdph", recipe=str(file), settings=settings)
    prepared = prepare(asked, Path("none"), OPTIONS)
    assert {row.kind for row in prepared.rows} == {"alone", "method", "longer", "larger", "teacher"}
    for row in prepared.rows:
        of = row.recipe
        assert (of.schedule, of.label_smoothing, of.lr) == ("cosine", 0.1, 0.3), row.label
        assert (of.final_lr, of.mix_prob) == (0.01, 0.5), row.label
        assert (of.batch_size, of.crop_padding, of.flip) == (128, 4, True), row.label
        assert (of.dataset, of.epochs) == ("digits", 2) or row.kind == "longer"
    mcl = prepare(
        replace(asked, recipe="mcl/resnet32/cifar100", settings={"epochs": 2}),
        Path("none"),
        OPTIONS,
    )
    assert {row.recipe.images_per_class for row in mcl.rows} == {0}
    assert settings_of(str(file), {"mixup": 0})["mixup"] == 0  # of a style of the data set, too
    with pytest.raises(UserError, match="schedule step has no final rate"):
        prepare(replace(asked, recipe="dml/resnet20/cifar100"), Path("none"), OPTIONS)
    with pytest.raises(UserError, match="and --published each its own"):
        replace(asked, published=True)


def test_conditions_have_the_same_budget() -> None:
    asked = replace(
        REQUEST, label_noise=(0.0, 0.4), fraction=(0.1, 1.0), methods="okddip_kd-branch"
    )
    prepared = prepare(asked, Path("none"), OPTIONS)
    by_folder = {entry.run.folder: entry for entry in prepared.entries}
    few = by_folder["okddip_kd-branch-fraction0.1-seed1"]
    assert few.images == by_folder["okddip_kd-branch-seed1"].images == 100
    of = few.run.recipe
    assert (of.fraction, of.epochs, of.batch_size, of.seed) == (0.1, 10, 10, 1)
    assert of.lr == pytest.approx(0.1 * 10 / 25)
    assert by_folder["okddip_kd-branch-noise0.4-seed1"].run.recipe.label_noise == 0.4
    # One teacher for all seeds, and one for each where the seed decides on its images and labels.
    assert by_folder["okddip_kd-branch-seed1"].taught_by == "teacher-resnet110-seed0"
    assert few.taught_by == "teacher-resnet110-fraction0.1-seed1"
    folders = list(by_folder)
    assert folders.index(few.taught_by) < folders.index(few.run.folder)
    with pytest.raises(UserError, match="--teacher names a trained teacher, which has seen other"):
        prepare(asked, Path("none"), replace(OPTIONS, teacher=("nowhere",)))


def test_macs_by_hand() -> None:
    macs = model_info("resnet8", 10).macs
    assert training_macs(recipe("baseline/resnet8/digits"), 10) == 3 * macs
    assert training_macs(recipe("dml@3/resnet8/digits"), 10) == 9 * macs
    taught = training_macs(recipe("kd/resnet8/digits"), 10)
    assert taught == 3 * macs + model_info("resnet110", 10).macs
    branch = training_macs(recipe("ind-branch@4/resnet8/digits"), 10)
    assert 3 * macs < branch < 12 * macs
    larger = larger_student("resnet8", 4, 10, 32)
    assert larger is not None
    assert larger.ratio == model_info(larger.model, 10).macs / macs
    assert larger_student("wrn_28_10_basic", 4, 10, 32) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("okdip --seeds 0,1", "unknown method 'okdip': did you mean okddip"),
        ("okddip", "okddip has two forms: name one or both, okddip-branch,okddip-network"),
        ("cl_ilr-network", "cl_ilr has no form 'network': choose branch"),
        ("dml,dml", "names dml-network twice: leave one of them out"),
        ("dml --seeds 0,1,0", "--seeds has 0 twice: leave one of them out"),
        ("dml --seeds x", "--seeds is 'x': write whole numbers, such as 0,1,2"),
        ("dml --fraction 0.1,2", "fraction is 2.0: it must be above 0 and at most 1"),
        ("dml --label-noise 1", "label_noise is 1.0: it must be at least 0 and below 1"),
        ("baseline", "names no method beside the baseline: name at least one"),
        ("dml --set epoch=3", "unknown setting 'epoch'"),
        ("dml --set lr=0.1,0.2", "--set gives lr 2 values"),
        ("kd --teacher nowhere", "there is none at nowhere"),
        ("dml --budget time", "--budget is 'time': choose images or macs"),
        ("dml --students 1", "students is 1, but dml trains at least 2"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"compare {words} --model resnet8 --dataset digits --epochs 1 --device cpu"
    assert run_command(command.split()) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        "compare dml --model resnet8 --dataset digits --epochs 2 --label-noise 0 0.2 --seeds 0 1"
    )
    assert run_command([*command.split(), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {run["folder"] for run in facts["runs"]} >= {"alone-seed0", "dml-network-noise0.2-seed1"}
    assert facts["images_left"] == sum(run["images"] for run in facts["runs"])
    assert list(tmp_path.iterdir()) == []


def drawn(page: str, name: str) -> list[dict[str, Any]]:
    """The numbers of an interactive chart."""
    found = re.search(
        rf'<figure id="{name}".*?<script type="application/json">(.*?)</script>', page, re.S
    )
    assert found is not None, name
    values: list[dict[str, Any]] = json.loads(found[1])["data"]["values"]
    return values


def test_the_charts_have_the_runs_numbers(made: Made) -> None:
    prepared, done, _ = made
    page = (prepared.out / "comparison.html").read_text()
    rows = {row["row"]: row for row in done.facts["sections"][0]["rows"]}
    runs = {run["folder"]: run for run in done.facts["runs"]}
    for name in ("accuracy", "cost"):
        means = [value for value in drawn(page, name) if "kept" in value]
        assert [value["row"] for value in means] == [*rows]
        for value in means:
            row = rows[value["row"]]
            low_high = [value.get("low"), value.get("high")]
            assert value["kept"] == pytest.approx(row["kept_top1"]["mean"])
            assert low_high == pytest.approx(row["kept_top1_interval"] or [None, None])
            assert value.get("spent", row["macs"]) == row["macs"]
    seeds = {value["run"]: value["one"] for value in drawn(page, "accuracy") if "one" in value}
    assert seeds == {name: pytest.approx(run["kept_top1"]) for name, run in runs.items()}
    differences = drawn(page, "difference")
    assert len(differences) == sum(len(row["against"]) for row in rows.values())
    for value in differences:
        against = rows[value["row"]]["against"][value["at"].removeprefix(f"{value['row']} ")]
        assert value["value"] == pytest.approx(against["difference"])
        assert [value["low"], value["high"]] == pytest.approx(against["interval"] or [None, None])
    for value in drawn(page, "reliability"):
        points = rows[value["row"]]["reliability"]
        assert [value["confidence"], value["right"], value["images"]] in [
            pytest.approx(p) for p in points
        ]
    lines = {value["name"]: value for value in drawn(page, "parallel")}
    assert lines.keys() == runs.keys()
    table = (prepared.out / "comparison.csv").read_text().partition("Every run")[2]
    for cells in csv.DictReader(table.strip().splitlines()):
        run = runs[cells["run"]]
        assert (cells["row"], int(cells["seed"])) == (run["row"], run["seed"])
        assert float(cells["test top-1 (%), kept"]) == pytest.approx(run["kept_top1"])
        assert float(cells["MACs"]) == run["macs"]
        assert float(cells["ECE (%)"]) == pytest.approx(run["ece"], abs=1e-6)


def test_a_verdict_names_what_is_clear(made: Made) -> None:
    done = made[1]
    assert done.facts["verdicts"][0].startswith(
        "Compared with one student that sees the same images: "
    )
    section = done.sections[0]
    (row,) = (one for one in section.rows if one.contestant.label == "okddip-branch")
    for p, value, says in (
        (0.01, 2.0, "is better"),
        (1e-6, -2.0, "is worse"),
        (0.2, 2.0, "1 method of 1 can't"),
    ):
        difference = Difference(value, (value - 1, value + 1))
        against = Against(ALONE, Paired(difference, p, 2), p)
        changed = replace(section, rows=(replace(row, against={"images": against}),))
        (said,) = verdicts([changed])
        assert says in said
        assert ("p < 0.0001" in said) == (p < 1e-4)
    alone = Against(ALONE, Paired(Difference(1.0, None), None, 1))
    assert (
        "no test"
        in verdicts([replace(section, rows=(replace(row, against={"images": alone}),))])[0]
    )


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(made: Made, tmp_path: Path) -> None:
    page = (made[0].out / "comparison.html").read_text()
    assert "mathdefault" not in page  # formulas aren't drawn
    script = """
      document.body.style.width = '368px';
      dispatchEvent(new Event('resize'));
      await new Promise(done => setTimeout(done, 300));
      const heights = [...document.querySelectorAll('figure .live svg')].map(
        s => [s.closest('figure').id, Math.round(s.getBoundingClientRect().height)]);
      const cost = document.querySelector('#cost');
      const points = () => cost.querySelectorAll('.mark-symbol path').length;
      const before = points();
      cost.querySelector('button').click();
      await cost.view.runAsync();
      return [heights, document.querySelector('main').scrollWidth, before - points(),
              performance.getEntriesByType('resource').length];
    """
    heights, width, hidden, fetched = asked(page, tmp_path, script)
    assert [name for name, _ in heights] == [
        "accuracy",
        "difference",
        "cost",
        "reliability",
        "parallel",
    ]
    assert min(height for _, height in heights) > 60
    assert width <= 400
    assert (hidden, fetched) == (1, 0)
