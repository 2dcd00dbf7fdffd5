"""Welch's interval, compared with scipy's from the raw values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastokd.report.statistics import Sample, welch


@pytest.mark.parametrize("counts", [(3, 3), (2, 3), (5, 3), (3, 10)])
def test_the_interval_is_welchs(counts: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(counts))
    a, b = generator.normal(25, 0.3, counts[0]), generator.normal(26, 0.1, counts[1])
    difference = welch(Sample.of(a.tolist()), Sample.of(b.tolist()))
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    assert difference.interval == pytest.approx((expected.low, expected.high))


def test_a_published_pair_is_enough() -> None:
    """Table 2's ResNet-32 row: OKDDip's branch form minus its baseline."""
    difference = welch(Sample(25.63, 0.14, 3), Sample(28.76, 0.08, 3))
    assert difference.interval is not None
    low, high = difference.interval
    assert low < -3.13 < high < 0
    assert str(difference) == f"-3.13 [{low:+.2f}, {high:+.2f}]"


def test_single_runs_have_no_interval() -> None:
    assert welch(Sample.of([25.0]), Sample(26.0, 0.1, 3)).interval is None
    assert welch(Sample.of([25.0, 25.2]), Sample(26.0, None, 1)).interval is None
    assert str(Sample.of([25.0])) == "25.00"
    assert str(Sample.of([25.0, 26.0])) == "25.50 ± 0.71"


def test_runs_without_spread() -> None:
    assert welch(Sample(1.0, 0.0, 3), Sample(2.0, 0.0, 3)).interval == (-1.0, -1.0)
    one_sided = welch(Sample(1.0, 0.0, 3), Sample(2.0, 0.1, 3)).interval
    assert one_sided is not None
    assert one_sided[0] < -1 < one_sided[1]
