"""The page about runs: its contents, and its display in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastokd.checkpoint import save_checkpoint
from fastokd.cli import run_command
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.report.charts import page_of
from fastokd.report.difference import diff_runs
from fastokd.report.html_tables import as_html
from fastokd.report.page import Shown, _page, report
from fastokd.report.pictures import pictures
from fastokd.report.plots import as_svg, draw_all, in_page
from fastokd.report.pools import pool_runs
from fastokd.report.results import published_table, results_table
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from tests.report.fake import FakeTrain

EPOCHS = 3


def make(folder: Path, name: str, *seeds: int, **changes: Any) -> list[Path]:
    """Runs of one recipe; each seed is 0.1 points better than the one before."""
    fake = FakeTrain(lambda recipe, epoch: 0.5 + epoch / 10 + recipe.seed / 1000)
    made = []
    for seed in seeds:
        resolved = recipe(name, seed=seed, epochs=EPOCHS, **changes)
        out = folder / f"{name.replace('/', '-')}-seed{seed}"
        fake(resolved, RunOptions(out=out))
        made.append(out)
    return made


def published(runs: list[Path]) -> str:
    """The table beside the papers' numbers; "" if there is none."""
    table = published_table(pool_runs([Run.load(run) for run in runs]))
    return "" if table is None else as_html(table)


class Elements(HTMLParser):
    """The ids of a page, and every address that it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("figure", "table"):
            self.ids.append(values.get("id") or "")
        for name in ("src", "href", "xlink:href"):
            value = values.get(name)
            if value and not value.startswith(("#", "data:")):
                self.fetched.append(value)


def test_one_run_has_every_figure_and_fetches_nothing(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "okddip-branch/resnet8/digits", 0)
    out = report([run])
    assert out == run / "report.html"
    found = Elements(out.read_text())
    figures = ["loss", "accuracy", "diversity", "lr", "kd_weight", "attention"]
    assert [name for name in found.ids if not name.endswith("-numbers")] == ["results", *figures]
    assert found.fetched == []
    for name in figures:
        assert (run / f"report-{name}.png").stat().st_size > 1000
        assert "<svg" in (run / f"report-{name}.svg").read_text()
    assert "currentColor" not in (run / "report-loss.svg").read_text()


def test_seeds_are_pooled_and_group_sizes_plotted(tmp_path: Path) -> None:
    runs = make(tmp_path, "okddip-branch/resnet8/digits", 0, 1, 2)
    runs += make(tmp_path, "okddip-branch@3/resnet8/digits", 0)
    runs += make(tmp_path, "baseline/resnet8/digits", 0)
    out = report([tmp_path], tmp_path / "all.html")
    page = out.read_text()
    assert "3 recipes compared" in page
    assert "group_size" in Elements(page).ids
    assert "70.10 ± 0.10" in page  # seeds 0, 1, 2 at 70.0, 70.1 and 70.2
    pools = pool_runs([Run.load(run) for run in runs])
    assert len(pools) == 3
    epochs, means, deviations = pools[0].curve(lambda row: 100 * row["test"]["mean_top1"])
    assert epochs == [1, 2, 3]
    assert means == pytest.approx([50.1, 60.1, 70.1])
    assert deviations == pytest.approx([0.1, 0.1, 0.1])


def test_a_cell_of_the_papers_stands_beside_ours_and_says_that_it_is_short(tmp_path: Path) -> None:
    make(tmp_path, "okddip-branch/resnet32/cifar100", 0, 1)
    page = report([tmp_path], tmp_path / "cell.html").read_text()
    assert "table2, resnet32, okddip_branch" in page
    assert "no reproduction: epochs=3 (300)<" in page
    assert f"{EPOCHS} of 300" in page


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"lr": 0.05}, {}, "lr=0.05 (0.1)"),
        ({"weight_decay": 0.0}, {}, "weight_decay=0 (0.0005)"),
        ({"mix": "probs"}, {}, "mix=probs (logits)"),
        ({"students": 3}, {}, "students=3 (4)"),
        ({"milestones": [1]}, {}, "milestones=1 (150 225)"),
        ({"val": 5000}, {}, "val=5000 (0)"),
        ({"model_options": {"width": 2}}, {}, "width=2 (None)"),
        ({"ema": 0.9}, {}, "ema=0.9 (0)"),
        ({}, {"clip_norm": 1.0}, "clip_norm=1 (None)"),
        ({}, {"init": ["w.pth"]}, "init=w.pth (None)"),
        ({}, {"eval_every": 1, "precision": "bf16"}, ""),
    ],
)
def test_all_in_which_a_run_differs_from_a_cell_stands_beside_it(
    changes: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    name = "okddip-branch/resnet32/cifar100"
    (run,) = make(tmp_path, name, 0, **changes)
    (run / "environment.json").write_text(json.dumps(options))
    (pool,) = pool_runs([Run.load(run)])
    page = published([run])
    row = page[page.index("table2, resnet32, okddip_branch") :].split("</tr>")[0]
    assert "no reproduction: " in row
    assert "epochs=3 (300)" in row
    assert says in row.replace("epochs=3 (300)", "")
    if not says:
        assert re.sub("<[^>]*>", "", row).count("=") == 1, "nothing else differs"
    assert says.split(" (")[0].replace("w.pth", "trained weights") in pool.label


def test_another_task_is_never_beside_a_cell(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "okddip-branch/resnet32/cifar100", 0, model="resnet8")
    assert published([run]) == ""
    (run,) = make(tmp_path / "other", "okddip-branch/resnet32/cifar100", 0, sharing="network")
    assert published([run]) == ""


def test_a_run_that_was_cut_is_marked_and_not_pooled(tmp_path: Path) -> None:
    name = "okddip-branch/resnet32/cifar100"
    whole, cut = make(tmp_path, name, 0, 1)
    shutil.rmtree(cut / "checkpoints")
    save_checkpoint(cut / "checkpoints/last-000000002", {}, {"epoch": 2, "step": 2})
    pools = pool_runs([Run.load(whole), Run.load(cut)])
    assert "2 of 3 epochs trained, 2 steps" in published([whole, cut])
    assert [pool.label for pool in pools] == [
        f"{name} epochs=3",
        f"{name} epochs=3 (2 of 3 epochs)",
    ]
    assert diff_runs(whole, cut)["results"]["whole epochs"] == [3, 2]


def test_runs_of_other_options_are_not_pooled(tmp_path: Path) -> None:
    runs = make(tmp_path, "dml/resnet8/digits", 0, 1)
    (runs[1] / "environment.json").write_text(json.dumps({"clip_norm": 0.9}))
    labels = [pool.label for pool in pool_runs([Run.load(run) for run in runs])]
    assert labels == [
        "dml/resnet8/digits epochs=3 clip_norm=None",
        "dml/resnet8/digits epochs=3 clip_norm=0.9",
    ]


def test_a_lone_student_has_no_mean(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "baseline/resnet8/digits", 0)
    page = report([run]).read_text()
    assert "<td class=text>student</td>" in page
    assert "all students</text>" not in page
    assert "student 0" not in page
    assert "mean</td>" not in page
    assert "ensemble" not in page


def test_what_is_told_apart_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a", "dml/resnet8/digits", 0)
    make(tmp_path / "b", "dml/resnet8/digits", 0, lr=0.05)
    pools = pool_runs([Run.load(p.parent) for p in sorted(tmp_path.glob("*/*/recipe.json"))])
    assert [pool.label for pool in pools] == [
        "dml/resnet8/digits epochs=3 lr=0.1",
        "dml/resnet8/digits epochs=3 lr=0.05",
    ]
    assert set(draw_all(pools)) >= {"loss", "accuracy", "diversity", "lr", "kd_weight"}


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_ticks_are_whole_epochs_and_plain_numbers(epochs: int, tmp_path: Path) -> None:
    """The loss of 40 epochs spans a factor above 10: its axis is logarithmic."""
    fake = FakeTrain(lambda _, epoch: 0.5)
    resolved = recipe("okddip-branch/resnet8/digits", epochs=epochs)
    figures = draw_all(pool_runs([fake(resolved, RunOptions(out=tmp_path / "run"))]))
    for name, figure in figures.items():
        svg = in_page(as_svg(figure))  # draws, which places the ticks
        axes = figure.axes[0]
        shown = [label.get_text() for label in axes.get_xticklabels()]
        assert all(re.fullmatch(r"\N{MINUS SIGN}?\d+", text) for text in shown), (name, shown)
        assert "$" not in svg
        assert "var(--c0, #0072b2)" in svg or name == "attention"
        assert "test" in axes.get_title(loc="left") or name in ("loss", "lr", "kd_weight")
    assert (figures["loss"].axes[0].get_yscale() == "log") == (epochs == 40)


def test_a_notebook_shows_each_figure_black_on_white(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "okddip-branch/resnet8/digits", 0)
    shown = pictures(Run.load(run))
    assert shown.keys() == {"loss", "accuracy", "diversity", "lr", "kd_weight", "attention"}
    for picture in shown.values():
        svg = picture._repr_svg_()
        assert svg.startswith("<svg")
        assert 'fill="white"' in svg
        assert "currentColor" not in svg


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    (run,) = make(tmp_path, "baseline/resnet8/digits", 0)
    hostile = dataclasses.replace(Run.load(run).recipe, name="<script>alert(1)</script>")
    pool = dataclasses.replace(
        pool_runs([Run.load(run)])[0], label="<script>alert(1)</script>", recipe=hostile
    )
    page = _page(Shown([pool], {"results": results_table([pool])}, {}, [None]))
    assert "alert(1)" in page
    assert page.count("<script") == 1  # of the tables


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["nowhere"], "no run in nowhere"), (["twice", "twice"], "same seed")],
)
def test_what_cannot_be_shown_is_said(
    runs: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = make(tmp_path, "baseline/resnet8/digits", 0)
    made.rename(tmp_path / "twice")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        report(runs)


def test_a_difference_names_recipe_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make(tmp_path, "dml/resnet8/digits", 0, 3)
    found = diff_runs(first, second)
    assert found["recipe"] == {"seed": [0, 3]}
    assert found["results"]["last test top-1"] == [pytest.approx(0.7), pytest.approx(0.703)]
    assert found["results"]["whole epochs"] == [3, 3]  # equal results are listed as well
    assert run_command(["diff", str(first), str(second)]) == 0
    assert "seed: 0 | 3" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_each_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "runs/a folder with a long name that says all of what was tried"
    make(named, "okddip-branch/resnet8/digits", 0, 1)
    make(named, "baseline/resnet8/digits", 0, 1, lr=0.025)
    make(named, "okddip-branch@3/resnet8/digits", 0)
    # The browser measures the elements: figures without height aren't shown. At 400 pixels the results
    # scroll, and the page doesn't.
    probe = (
        "(async () => { await drawn; const main = document.querySelector('main');"
        "const shown = () => [...document.querySelectorAll('figure svg')].map(s => "
        "[s.closest('figure').id, Math.round(s.getBoundingClientRect().height)]).filter(f => f[1]);"
        "const paths = () => document.querySelectorAll('#loss .live .mark-line path').length;"
        "const found = { shown: shown(), wide: document.documentElement.scrollWidth > innerWidth,"
        "buttons: document.querySelectorAll('#loss .legend button').length, before: paths() };"
        "document.querySelector('#loss').scrollIntoView();"
        "const at = document.querySelector('#loss .live svg').getBoundingClientRect();"
        "const point = { clientX: at.x + at.width / 2, clientY: at.y + at.height / 2, bubbles: true };"
        "const under = document.elementFromPoint(point.clientX, point.clientY);"
        "for (const kind of ['pointerover', 'pointermove']) "
        "under.dispatchEvent(new PointerEvent(kind, point));"
        "await new Promise(done => setTimeout(done, 300));"
        "found.tip = document.querySelector('#vg-tooltip-element.visible')?.innerText;"
        "const button = document.querySelector('#loss .legend button'); button.click();"
        "await document.querySelector('#loss').view.runAsync();"
        "Object.assign(found, { after: paths(), pressed: button.getAttribute('aria-pressed') });"
        "document.body.style.width = '368px'; dispatchEvent(new Event('resize'));"
        "await new Promise(done => setTimeout(done, 300));"
        "const table = document.querySelector('#results').parentNode;"
        "Object.assign(found, { narrow: main.scrollWidth, hidden: table.scrollWidth - table.clientWidth });"
        "document.title = JSON.stringify(found); })()"
    )
    with monkeypatch.context() as patch:
        patch.setattr("fastokd.report.page.page_of", partial(page_of, last=[probe]))
        page = report([tmp_path / "runs"], tmp_path / "all.html")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*)</title>", done.stdout)
    assert title is not None
    found = json.loads(title.group(1))
    heights = dict(found["shown"])
    names = {
        *("loss", "accuracy", "diversity", "lr", "kd_weight", "group_size", "attention", "parallel")
    }
    assert set(heights) == names
    assert len(found["shown"]) == len(names), (
        "only one of the static and the interactive form is shown"
    )
    assert all(height > 100 for height in heights.values()), heights
    assert not found["wide"]
    assert (found["buttons"], found["before"], found["after"]) == (3, 3, 2)
    assert found["pressed"] == "false"
    assert re.findall(r"\t(.+)", found["tip"]) == ["2", "1", "1", "1"]
    assert found["narrow"] <= 368
    assert found["hidden"] > 100
