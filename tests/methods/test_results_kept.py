"""docs/results.md is what the kept metrics generate, and they are whole runs of the recipes it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(DOCS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load("results_page")


def test_the_page_is_made_of_them(results: ModuleType) -> None:
    page = results.page(results.read_kept(), results.helps_section.read_all())
    assert page == results.PAGE.read_text(), "run docs/results_page.py"


def test_its_pictures_have_every_method(results: ModuleType) -> None:
    rows = results.read_kept()
    drawn = results.draw(rows)
    for name, svg in drawn.items():
        kept = (results.KEPT / name).read_text()
        epochs = int(name.removesuffix("epochs.svg").rsplit("-", 1)[1])
        for row in rows:
            if row.epochs == epochs and ("accuracy" in name or row.pool.recipe.students > 1):
                assert row.name in kept, f"run docs/results_page.py: {name}"
                assert row.name in svg


def test_they_are_whole_runs_that_were_wanted(results: ModuleType) -> None:
    wanted = {run.name for run in load("results_fashion_mnist").wanted()}
    for row in results.read_kept():
        for run in row.pool.runs:
            assert run.folder.stem in wanted
            assert [line["epoch"] for line in run.metrics] == list(range(row.epochs))
            assert all(len(line["test"]["student_top1"]) > 0 for line in run.metrics)
        assert {facts["environment"]["precision"] for facts in row.facts} == {"bf16"}


def test_a_verdict_needs_seeds_and_an_interval_without_zero(results: ModuleType) -> None:
    """Of rows made up: one clearly ahead, one alone."""
    rows = results.read_kept()
    base = next(row for row in rows if row.name == "baseline")
    alone = results.replace(base, pool=results.replace(base.pool, runs=base.pool.runs[:1]))
    assert results._compared(alone, alone, "top-1")[1] == "too few seeds"
    high, low = shifted(results, base, 0.02), shifted(results, base, 0.0)
    assert results._compared(high, low, "top-1") == ("+2.00 [+1.77, +2.23]", "appears")
    assert results._compared(low, high, "top-1")[1] == "reversed"
    assert results._compared(low, low, "top-1")[1] == "within the spread"


def shifted(results: ModuleType, row: object, by: float) -> object:
    """Three runs about 0.9 + by, a tenth of a point apart."""
    run = row.pool.runs[0]  # type: ignore[attr-defined]
    last = run.metrics[-1]
    runs = [
        results.replace(
            run,
            metrics=[{**last, "test": {**last["test"], "student_top1": [0.9 + by + 0.001 * i]}}],
        )
        for i in (-1, 0, 1)
    ]
    return results.replace(row, pool=results.replace(row.pool, runs=tuple(runs)))  # type: ignore[attr-defined]


def test_where_it_helps_is_of_the_settings_recipes(results: ModuleType) -> None:
    helps = results.helps_section.where_it_helps
    found = {one.name: one for one in results.helps_section.read_all()}
    assert found.keys() == helps.SETTINGS.keys()
    for name, setting in helps.SETTINGS.items():
        for row in found[name].rows:
            assert list(row.runs) == list(setting.seeds)
            for seed, run in row.runs.items():
                assert run["recipe"] == setting.recipe(row.name, seed).to_json()
                assert run["top1"] == setting.recipe(row.name, seed).score(run["test"])


def test_a_claim_needs_the_best_lone_network_and_every_comparison(results: ModuleType) -> None:
    """Of rows made up: a group that is better than the lone network of its own epochs only, and one that is
    better than both."""
    section = results.helps_section
    alone, half = [0.80, 0.81, 0.79], [0.90, 0.91, 0.90]
    none, better = [0.90, 0.91, 0.895], [0.96, 0.975, 0.96]

    def row(name: str, of: list[float]) -> object:
        of_it = {"recipe": section.where_it_helps.SETTINGS["digits"].recipe(name, 0).to_json()}
        return section.Row(name, {seed: {"top1": top1, **of_it} for seed, top1 in enumerate(of)})

    lone = (row("alone", alone), row("alone, half the epochs", half))
    found = section.Found("digits", (*lone, row("one", none), row("ffsd", better)))
    assert found.best.name == "alone, half the epochs"
    of = section.judged([found])
    (same, best), (_, both) = of["digits", "one"], of["digits", "ffsd"]
    assert [same.clear, best.clear, both.clear] == [1, 0, 1]
    assert both.paired.difference.value == pytest.approx(6.1667, abs=1e-3)
    assert both.p > both.paired.p
    said = section._sentence(found, of)
    assert "better than alone for any of the three lengths: ffsd" in said
    assert "better than alone for the same epochs, but not than the best alone: one" in said
