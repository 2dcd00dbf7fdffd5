"""The kept figures of docs/methods_on_digits.py: every method ends where a lone network does."""

from __future__ import annotations

import collections
import importlib.util
import json
import statistics
from pathlib import Path

from fastokd.methods import list_methods

DOCS = Path(__file__).parents[2] / "docs"
KEPT = json.loads((DOCS / "methods_on_digits.json").read_text())


def test_every_method_ends_within_a_point_of_the_baseline_or_above() -> None:
    """The mean over seeds: a point is ten images, and one run's chance moves as many. PCL's mean model is a mean
    over all of the 240 steps, the first ones too."""
    top1 = collections.defaultdict(list)
    for run in KEPT["runs"].values():
        top1[run["method"]].append(run["top1"])
    baseline = statistics.mean(top1["baseline"])
    for method, values in top1.items():
        assert len(values) == 3, method
        assert statistics.mean(values) >= baseline - (0.02 if method == "pcl" else 0.01), method


def test_it_is_every_method() -> None:
    labels = {run["method"] for run in KEPT["runs"].values()}
    methods = {label.split("-")[0] for label in labels}
    assert methods == set(list_methods())
    assert {f"kdcl-{t}" for t in ("naive", "linear", "min_logit", "general")} <= labels


def test_the_page_is_made_of_them() -> None:
    spec = importlib.util.spec_from_file_location("on_digits", DOCS / "methods_on_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page(KEPT) == (DOCS / "methods_on_digits.md").read_text()
