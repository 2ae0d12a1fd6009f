"""Means and differences over seeds, with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval: mean +- half_width."""

    mean: float
    half_width: float
    """Half width of the 95 % interval by Student's t; NaN for fewer than two values."""


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with its confidence interval."""
    if len(values) < 2:
        return Estimate(float(np.mean(values)) if values else math.nan, math.nan)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Estimate(float(np.mean(values)), float(quantile * error))


@dataclass(frozen=True)
class Comparison:
    """Paired differences between values and those of a reference."""

    difference: Estimate
    pairs: int
    larger: int
    """Number of pairs in which the value is larger than the reference."""
    p: float
    """p of the two-sided paired t-test; NaN if there are no two different differences."""
    deviation: float
    """Standard deviation of the differences; NaN for fewer than two pairs."""


def compare(values: Sequence[float | None], reference: Sequence[float | None]) -> Comparison:
    """Compare values of the same seeds; pairs with a missing value are left out."""
    pairs = zip(values, reference, strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    p = math.nan
    if len(set(differences)) > 1:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    larger = sum(each > 0 for each in differences)
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else math.nan
    return Comparison(estimate(differences), len(differences), larger, p, deviation)


def needed_pairs(difference: float, deviation: float) -> int | None:
    """The smallest number of pairs with which a two-sided paired t-test at 5 % has a power of 80 %,
    for normal differences with mean `difference` and this standard deviation. None if there is no
    difference, or if the deviation is not known."""
    if difference == 0 or math.isnan(difference) or math.isnan(deviation):
        return None
    if deviation == 0:
        return 2
    effect = abs(difference) / deviation
    quantiles = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))
    pairs = max(
        2, math.floor((quantiles / effect) ** 2)
    )  # for a known deviation; the t-test needs more
    while _power(effect, pairs) < POWER:
        pairs += 1
    return pairs


def _power(effect: float, pairs: int) -> float:
    """Power of the test for a mean difference of `effect` standard deviations."""
    freedom, shift = pairs - 1, effect * math.sqrt(pairs)
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))
