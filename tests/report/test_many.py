"""Many runs on one page: sorted tables, a filter, parallel coordinates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from fastokd.recipe.names import recipe
from fastokd.report.charts import page_of
from fastokd.report.fields import filter_form, ordered, varying
from fastokd.report.html_tables import as_html, sort_value
from fastokd.report.many import Many, many_of
from fastokd.report.parallel import axes_of, parallel_spec
from fastokd.report.pools import numbers_of, pool_runs
from fastokd.report.statistics import Difference, Sample
from fastokd.report.tables import Column, Table, Written, as_csv
from fastokd.run.folder import Run
from fastokd.run.options import RunOptions
from tests.browser import CHROMIUM, asked
from tests.report.fake import FakeTrain

MIXED = Table(
    "t",
    "Mixed",
    (Column("name", text=True), Column("value"), Column("p"), Column("where", text=True)),
    (
        ("resnet20", Sample(9.5, 0.1, 2), Written("1 G", 1e9), "b"),
        ("resnet8", None, Written("2 M", 2e6), ""),
        ("resnet110", Difference(10.25, None), "unknown", "b"),
        ("<b>&", "-3 of 300", Written("<0.0001", 1e-7), "a"),
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A sweep: two methods, three rates, two seeds, and one other option of a method."""
    top, made = tmp_path_factory.mktemp("sweep"), []
    grid = itertools.product(("baseline", "dml"), (0.01, 0.1, 0.3), (0, 1))
    for number, (method, lr, seed) in enumerate(grid):
        changes: dict[str, Any] = {"label_noise": 0.2} if number == 11 else {}
        of = recipe(f"{method}/resnet8/digits", epochs=2, lr=lr, seed=seed, **changes)
        fake = FakeTrain(lambda _, epoch, n=number: 0.5 + n / 100 + epoch / 1000)  # type: ignore[misc]
        made.append(fake(of, RunOptions(out=top / f"run{number}")))
    return made


def numbers(runs: list[Run]) -> Many:
    found = many_of(pool_runs(runs))
    assert found is not None
    return found


def test_a_number_is_sorted_by_its_value() -> None:
    values = [sort_value(row[1]) for row in MIXED.rows]
    assert values == [9.5, None, 10.25, -3.0]
    assert [
        sort_value(text) for text in ("[93.1, 94]", "1,234 of 2", "2.5e-05 ± 1", "unknown", "")
    ] == [*(93.1, 1234, 2.5e-05, None, None)]
    assert sort_value(Sample(math.nan, None, 1)) is None
    assert as_csv(MIXED).splitlines()[1].split(",")[-2] == "1000000000"
    html = as_html(MIXED)
    assert '<td data-value="1e-07">&lt;0.0001</td>' in html
    assert "<td>unknown</td>" in html


def test_a_table_has_heads_of_rows_and_columns() -> None:
    grouped = dataclasses.replace(
        MIXED, columns=(*MIXED.columns[:2], Column("p", "g"), Column("where", "g"))
    )
    html = as_html(grouped)
    assert html.count('<th scope="row" class=text>') == 4
    assert html.count('scope="col"') == 4
    assert '<tr><td colspan="1"></td><td colspan="1"></td><th scope="colgroup" colspan="2"' in html
    assert "data-runs" not in html
    assert "<button" not in html  # the script makes them, so without it the table is plain


def test_the_fields_are_those_in_which_runs_differ(runs: list[Run]) -> None:
    fields = varying(runs)
    assert [*fields] == ["method", "students", "seed", "label_noise", "lr"]
    assert fields["lr"] == [run.recipe.lr for run in runs]
    assert fields["method"] == [run.recipe.method for run in runs]
    assert varying(runs[:1]) == {}
    assert ordered([0.3, None, 0.1, 0.3]) == [0.1, 0.3, None]
    form = filter_form({"<i>": ["</script>", "&"]}, ["a", "b"])
    assert "<i>" not in form
    assert form.count("</script>") == 1


def test_every_run_has_a_row_and_a_line(runs: list[Run]) -> None:
    many = numbers(runs)
    runs = [run for pool in pool_runs(runs) for run in pool.runs]
    assert [n for of in numbers_of(pool_runs(runs)) for n in of] == [*range(12)]
    rows = parallel_spec(many.axes, many.names)["data"]["values"]
    for row, cells, run in zip(rows, many.table.rows, runs, strict=True):
        assert row["name"] == cells[0] == str(run.folder)
        test = run.metrics[-1]["test"]["mean_top1"]
        assert cells[1] == Sample(100 * test, None, 1)
        assert float(row["t5"]) == pytest.approx(100 * test)
        assert (row["t0"], float(row["t4"])) == (run.recipe.method, run.recipe.lr)
    # The best run is on top of the result's axis and the worst at its foot; 0.3 lies above 0.1.
    heights = [row["h5"] for row in rows]
    assert (heights[0], heights[11]) == (0, 1)
    assert heights == sorted(heights)
    assert max(r["h4"] for r in rows if r["t4"] == "0.1") < min(
        r["h4"] for r in rows if r["t4"] == "0.3"
    )
    some = {name: many.fields[name] for name in ("lr", "seed")}
    assert (
        dataclasses.replace(many, fields=some).axes == []
    )  # the chart would say no more than the table
    assert many_of(pool_runs(runs[:4])) is None


def test_many_numbers_lie_on_a_scale() -> None:
    rates = [0.001 * 2**i for i in range(10)]
    rate, noise, result = axes_of(
        {"lr": rates, "noise": [True, None] * 5}, "top-1", [float(i) for i in range(10)]
    )
    assert rate.heights == pytest.approx([i / 9 for i in range(10)])  # logarithmic
    assert [text for _, text in rate.ticks][::2] == ["0.001", "0.0226", "0.512"]
    assert [text for _, text in noise.ticks] == ["True", "none"]
    assert result.heights == pytest.approx([i / 9 for i in range(10)])
    (same,) = axes_of({}, "top-1", [50.0, 50.0])
    assert same.heights == (0, 0)


@pytest.fixture(scope="module")
def seen(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser shows after clicks on a table's heads, the filter's settings and a click on a line."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    script = """
      const mixed = document.querySelector('#t');
      const heads = [...mixed.querySelectorAll('thead button')];
      const sorted = [0, 1, 1, 2, 3].map(i => {
        heads[i].click();
        return [[...mixed.querySelectorAll('tbody th')].map(e => e.textContent),
                heads.map(h => h.parentNode.getAttribute('aria-sort'))];
      });
      const form = document.querySelector('form.filter'), words = form.querySelector('input');
      const figure = document.querySelector('figure.chart');
      const rows = [...document.querySelectorAll('#runs tbody tr')];
      const named = rows => rows.map(r => r.cells[0].textContent.split('/').at(-1));
      const lines = layer => [...figure.querySelectorAll(`g.layer_${layer}_marks path`)];
      const state = async () => {
        await new Promise(done => setTimeout(done, 100));
        await figure.view.runAsync();
        return [named(rows.filter(r => r.getClientRects().length)),
                form.querySelector('output').textContent, lines(1).length];
      };
      const input = () => form.dispatchEvent(new Event('input'));
      const filtered = [await state()];
      form.elements.method.value = 'dml'; input(); filtered.push(await state());
      words.value = 'LR=0.3'; input(); filtered.push(await state());
      form.reset(); filtered.push(await state());
      words.value = 'nothing'; input(); filtered.push(await state());
      form.reset(); await state();
      lines(2)[7].dispatchEvent(new MouseEvent('click', {bubbles: true}));
      await state();
      return {sorted, filtered, buttons: heads.map(h => [h.type, h.tabIndex]),
              chosen: named(rows.filter(r => r.matches('.chosen')))};
    """
    many = numbers(runs)
    text = page_of("t", f"{as_html(MIXED)}<section>{many.section('', '', '<svg></svg>')}</section>")
    found: dict[str, Any] = asked(text, tmp_path_factory.mktemp("browser"), script)
    return found


def test_a_head_sorts_its_column(seen: dict[str, Any]) -> None:
    assert seen["buttons"] == [["button", 0]] * 4  # which take Enter and Space
    names = [order for order, _ in seen["sorted"]]
    assert names[0] == ["<b>&", "resnet8", "resnet20", "resnet110"]
    assert names[1] == ["<b>&", "resnet20", "resnet110", "resnet8"]
    assert names[2] == ["resnet110", "resnet20", "<b>&", "resnet8"]  # missing ones stay last
    assert names[3] == ["<b>&", "resnet8", "resnet20", "resnet110"]
    assert names[4] == ["<b>&", "resnet20", "resnet110", "resnet8"]  # stable: 20 was above 110
    assert [marks for _, marks in seen["sorted"]][1:3] == [
        [None, "ascending", None, None],
        [None, "descending", None, None],
    ]


def test_a_filter_hides_rows_and_lines(seen: dict[str, Any]) -> None:
    every, dml, high, reset, none = seen["filtered"]
    names = [f"run{number}" for number in range(12)]
    assert every == [names, "12 of 12 runs", 12]
    assert dml == [names[6:], "6 of 12 runs", 6]
    assert high == [names[10:], "2 of 12 runs", 2]
    assert reset == every
    assert none == [[], "0 of 12 runs", 0]
    assert seen["chosen"] == ["run7"]
