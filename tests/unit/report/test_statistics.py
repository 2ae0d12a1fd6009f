"""Estimates and paired comparisons, against tables of Student's t and numbers by hand."""

import math

import pytest

from qsr.report.statistics import compare, estimate


def test_a_mean_and_its_interval() -> None:
    # variance 4, standard error 1; t of 3 degrees of freedom at 97.5 %: 3.1824
    found = estimate([1.0, 1.0, 1.0, 5.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(3.1824, abs=1e-4)
    found = estimate([1.0, 3.0])
    # standard deviation sqrt(2), standard error 1; 1 degree of freedom: 12.706
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(12.706, abs=1e-3)


def test_too_few_values_have_no_interval() -> None:
    assert estimate([2.0]).mean == 2.0
    assert math.isnan(estimate([2.0]).half_width)
    assert math.isnan(estimate([]).mean)


def test_pairs_are_compared() -> None:
    found = compare([2.0, 3.0, 7.0, None], [1.0, 5.0, 4.0, 0.0])
    assert (found.pairs, found.larger) == (3, 2)  # 1, -2, 3
    assert found.difference.mean == pytest.approx(2 / 3)
    # standard error sqrt(19 / 3 / 3); t = 0.4588 of 2 degrees of freedom
    assert found.difference.half_width == pytest.approx(4.3027 * math.sqrt(19 / 9), abs=1e-3)
    assert found.p == pytest.approx(0.691, abs=1e-3)


def test_equal_pairs_have_no_test() -> None:
    found = compare([1.0, 2.0], [1.0, 2.0])
    assert (found.difference.mean, found.larger) == (0.0, 0)
    assert math.isnan(found.p)
    assert compare([None], [1.0]).pairs == 0
