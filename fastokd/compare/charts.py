"""The charts of a comparison's page: interactive, and static for print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastokd.compare.figures import AGAINST, shown_rows
from fastokd.compare.intervals import accuracy_spec, difference_spec
from fastokd.compare.marks import Spec, series_of
from fastokd.compare.points import cost_spec, curves_spec, reliability_spec, reliability_table
from fastokd.compare.results import Section
from fastokd.report.charts import Chart, quiet
from fastokd.report.plots import as_svg, in_page

TITLES = {
    "accuracy": "Accuracy of the kept student",
    "difference": "Difference from students alone",
    "cost": "Accuracy against cost",
    "reliability": "Calibration",
    "noise": "Wrong training labels",
    "fraction": "Few training images",
}
CAPTIONS = {
    "accuracy": "Test top-1 of the kept student after the last epoch: the mean over seeds with its 95% "
    "interval, and each seed as a stroke. Methods are blue, students alone orange.",
    "difference": "Points of the kept student's test top-1, paired by seed, with 95% intervals of Student's t. "
    "The intervals aren't corrected for the number of methods; the result above and p are. "
    + "; ".join(
        f"{colour}: minus {label}"
        for (label, _), colour in zip(AGAINST.values(), ("Blue", "green", "pink"), strict=True)
    )
    + ".",
    "cost": "The accuracy against the multiply-accumulates that a run's training spends (counted), with 95% "
    "intervals.",
    "reliability": "The kept student's accuracy against its confidence on the test images, in 15 bins of "
    "all seeds together. On the thin line both are equal.",
    "noise": "The same accuracy with wrong training labels, with 95% intervals; the test labels are right.",
    "fraction": "The same accuracy with fewer training images and as many images seen, with 95% intervals.",
}
SPECS: dict[str, Callable[[Sequence[Section]], Spec]] = {
    "accuracy": accuracy_spec,
    "difference": difference_spec,
    "cost": cost_spec,
    "reliability": lambda found: reliability_spec(found[0]),
    "noise": lambda found: curves_spec(
        found, lambda s: 100 * s.condition.label_noise, "wrong labels (%)"
    ),
    "fraction": lambda found: curves_spec(
        found, lambda s: 100 * s.condition.fraction, "training images used (%)"
    ),
}


def charts_of(found: Sequence[Section], figures: Mapping[str, Any]) -> list[Chart]:
    """A chart for each of ``figures``, which are its static form."""
    series = series_of(shown_rows(found[0]))
    return [
        Chart(
            name,
            TITLES[name],
            CAPTIONS[name],
            {**SPECS[name](found), **quiet(TITLES[name])},
            in_page(as_svg(figure)),
            () if name in ("accuracy", "difference") else series,
            reliability_table(found[0]) if name == "reliability" else None,
        )
        for name, figure in figures.items()
    ]
