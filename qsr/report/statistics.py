"""Means, differences and how sure one can be of them, over seeds."""

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
    """Of the 95 % interval by Student's t distribution; not a number for fewer than two values."""


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values."""
    if len(values) < 2:
        return Estimate(float(np.mean(values)) if values else math.nan, math.nan)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Estimate(float(np.mean(values)), float(quantile * error))


@dataclass(frozen=True)
class Comparison:
    """Values minus those of a reference, pair by pair."""

    difference: Estimate
    pairs: int
    larger: int
    """Pairs in which the value is larger than the reference's."""
    p: float
    """Of the two-sided paired t-test; not a number for fewer than two pairs, or all equal."""
    deviation: float
    """Standard deviation of the differences; not a number for fewer than two pairs."""


def compare(values: Sequence[float | None], reference: Sequence[float | None]) -> Comparison:
    """Of the same seeds; a pair with a missing value is left out."""
    pairs = zip(values, reference, strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    p = math.nan
    if len(set(differences)) > 1:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    larger = sum(each > 0 for each in differences)
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else math.nan
    return Comparison(estimate(differences), len(differences), larger, p, deviation)


def needed_pairs(difference: float, deviation: float) -> int | None:
    """The smallest number of pairs with which the two-sided paired t-test at 5 % finds a true mean
    `difference` of normal differences of this standard deviation with a probability of 80 %. None
    if no number does: there is no difference, or the deviation is not known."""
    if difference == 0 or math.isnan(difference) or math.isnan(deviation):
        return None
    if deviation == 0:
        return 2
    effect = abs(difference) / deviation
    quantiles = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))
    pairs = max(2, math.floor((quantiles / effect) ** 2))  # of known deviation: the test needs more
    while _power(effect, pairs) < POWER:
        pairs += 1
    return pairs


def _power(effect: float, pairs: int) -> float:
    """Of the test, for a mean difference of `effect` standard deviations."""
    freedom, shift = pairs - 1, effect * math.sqrt(pairs)
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))
