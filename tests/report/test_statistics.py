"""Welch's interval, compared with scipy's from the raw values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastokd.report.statistics import Sample, holm, interval_of, paired, welch


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


def test_paired_differences_are_tested_as_scipy_does() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(70, 1, 5)
    b = a - generator.normal(0.5, 0.3, 5)
    found = paired(a.tolist(), b.tolist())
    expected = stats.ttest_rel(a, b)
    bounds = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.pairs == 5
    assert found.difference.value == pytest.approx((a - b).mean())
    assert found.difference.interval == pytest.approx((bounds.low, bounds.high))
    assert interval_of(a.tolist()) == pytest.approx(
        stats.t.interval(0.95, 4, a.mean(), stats.sem(a))
    )


def test_a_pair_by_hand() -> None:
    """Differences 1 and 3: mean 2, deviation sqrt 2, t = 2; of one degree of freedom p = 1 - 2 atan(2) / pi."""
    found = paired([11.0, 23.0], [10.0, 20.0])
    assert found.p == pytest.approx(1 - 2 * np.arctan(2) / np.pi)
    assert found.difference.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_one_pair_and_equal_differences() -> None:
    one = paired([2.0], [1.0])
    assert (one.difference.value, one.difference.interval, one.p, one.pairs) == (1.0, None, None, 1)
    assert interval_of([1.0]) is None
    equal = paired([1.1, 1.2], [1.0, 1.1])  # but for rounding
    assert (equal.difference.interval, equal.p) == (None, None)
    assert paired([2.0, 3.0], [2.0, 3.0]).p == 1


def test_holms_correction_by_hand() -> None:
    """Sorted .01, .02, .03, .04 times 4, 3, 2, 1 gives .04, .06, .06, .06; none sinks or exceeds 1."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
