"""The numbers of a study: what was measured in each group, and differences by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

import pandas as pd

from qsr.report.collect import Run
from qsr.report.statistics import Comparison, compare, estimate
from qsr.report.study import Group, Study
from qsr.report.study_settings import value_text
from qsr.run.folder import is_number


@dataclass(frozen=True)
class Metric:
    """A number of a run's summary."""

    name: str
    """Its name, with the unit, in the CSV file."""
    title: str
    """Its name and unit for people."""
    key: str
    """Its name in summary.json."""
    factor: float = 1.0
    """From the unit of summary.json to that of the name."""
    decimals: int = 2
    planned: bool = False
    """The plan decides it, so that usually all seeds have the same."""
    optional: bool = False
    """Left out where no run has it."""

    def of(self, run: Run) -> float | None:
        """The value of a run; None if it was not measured."""
        value = run.summary.get(self.key)
        return self.factor * value if value is not None and is_number(value) else None


METRICS = (
    Metric("top1_percent", "top-1 %", "top1"),
    Metric("best_top1_percent", "best top-1 %", "best_top1"),
    Metric("ema_top1_percent", "EMA top-1 %", "ema_top1", optional=True),
    Metric("uniform_top1_percent", "uniform top-1 %", "uniform_top1", optional=True),
    Metric("val_loss", "loss", "val_loss", decimals=4),
    Metric("volume_percent", "volume %", "volume", factor=100, decimals=1, planned=True),
    Metric("averages", "averages", "averages", decimals=0, planned=True),
    Metric("train_hours", "training", "train_seconds", factor=1 / 3600, decimals=2),
)
"""Results: top-1 and loss are those of the final mean model on validation; best is the highest
top-1 of all evaluations; EMA and uniform are averages over time (settings of `ema`); hours are
those of training, without evaluations and checkpoints."""

TIMES = (
    Metric("train_seconds", "training", "train_seconds"),
    Metric("data_idle_seconds", "waiting for data", "data_idle_seconds"),
    Metric("communication_seconds", "communication", "communication_seconds"),
    Metric("evaluation_seconds", "evaluations", "evaluation_seconds"),
    Metric("checkpoint_seconds", "checkpoints", "checkpoint_seconds"),
)
"""Where time went, in seconds. Waiting and communication are parts of training."""


@dataclass(frozen=True)
class Spread:
    """Values of a group: NaN is what cannot be known from them."""

    measured: int
    """Number of values."""
    runs: int
    """Number of runs, of which some may have no value."""
    mean: float
    deviation: float
    """Standard deviation over the runs; NaN for fewer than two values."""
    low: float
    high: float
    """Ends of the 95 % interval of the mean, by Student's t; NaN for fewer than two values."""


def spread(values: Sequence[float | None]) -> Spread:
    """Mean, standard deviation and interval of a group's values; None was not measured."""
    found = [value for value in values if value is not None]
    mean = estimate(found)
    return Spread(
        measured=len(found),
        runs=len(values),
        mean=mean.mean,
        deviation=stdev(found) if len(found) > 1 else math.nan,
        low=mean.mean - mean.half_width,
        high=mean.mean + mean.half_width,
    )


def result_metrics(study: Study) -> tuple[Metric, ...]:
    """METRICS without the optional ones that no run of the study has."""
    return tuple(
        metric
        for metric in METRICS
        if not metric.optional or any(metric.of(run) is not None for run in study.runs)
    )


def spread_of(group: Group, metric: Metric) -> Spread:
    """The spread of a metric over the runs of a group."""
    return spread([metric.of(run) for run in group.runs])


def difference(group: Group, reference: Group, metric: Metric) -> Comparison:
    """Differences to the reference by seed; seeds that only one of them has are left out."""
    theirs = {run.config.seed: metric.of(run) for run in reference.runs}
    ours = [metric.of(run) for run in group.runs]
    return compare(ours, [theirs.get(seed) for seed in group.seeds])


def unpaired(group: Group, reference: Group) -> list[int]:
    """The seeds that only one of two groups has."""
    return sorted(set(group.seeds) ^ set(reference.seeds))


def study_table(study: Study) -> pd.DataFrame:
    """One row for each group and metric; unknown numbers are NaN.

    Columns: `group`, the settings in which groups differ, `metric` (with its unit), `runs`,
    `measured` (runs with a value), `mean`, `sd`, `ci95_low` and `ci95_high` (of the mean, by
    Student's t), and for paired differences `reference`, `pairs`, `difference`, `difference_sd`,
    `difference_ci95_low`, `difference_ci95_high`.
    """
    metrics = (*result_metrics(study), *TIMES)
    return pd.DataFrame(
        [_row(study, group, metric) for group in study.groups for metric in metrics]
    )


def _row(study: Study, group: Group, metric: Metric) -> dict[str, str | float]:
    found = spread_of(group, metric)
    row: dict[str, str | float] = {"group": group.label}
    row |= {name: value_text(group.settings.get(name)) for name in [*study.by, *study.also]}
    row |= {
        "metric": metric.name,
        "runs": found.runs,
        "measured": found.measured,
        "mean": found.mean,
        "sd": found.deviation,
        "ci95_low": found.low,
        "ci95_high": found.high,
    }
    if study.reference is None:
        return row
    row["reference"] = study.reference.label
    if group is study.reference:
        return row
    change = difference(group, study.reference, metric)
    middle, half = change.difference.mean, change.difference.half_width
    return row | {
        "pairs": change.pairs,
        "difference": middle,
        "difference_sd": change.deviation,
        "difference_ci95_low": middle - half,
        "difference_ci95_high": middle + half,
    }
