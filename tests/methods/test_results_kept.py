"""docs/results.md is what the kept metrics of Fashion-MNIST generate, and they are whole runs."""

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
    assert results.page(results.read_kept()) == results.PAGE.read_text(), "run docs/results_page.py"


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
