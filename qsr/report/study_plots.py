"""A study -> figures."""

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsr.report.collect import Run
from qsr.report.plan_plots import plan_figure
from qsr.report.run_plots import parts_figure
from qsr.report.statistics import Estimate, estimate
from qsr.report.study import Group, Study
from qsr.report.study_numbers import METRICS, TIMES, difference
from qsr.report.style import (
    COMMUNICATION,
    COMPUTING,
    COMPUTING_AND_COMMUNICATION,
    STYLE,
    WAITING,
    label_log_decades,
    legend_once,
    nested_widths,
    rule_colors,
)
from qsr.report.symbols import typeset
from qsr.run.folder import is_number

_TOP1 = METRICS[0]
_BANDS = 6
"""Bands of more groups would cover each other."""
_MEAN: dict[str, Any] = {"fmt": "D", "markersize": 5, "capsize": 3, "elinewidth": 1.5, "zorder": 3}


def progress_figure(study: Study) -> Figure:
    """Top-1 error and loss on validation against epochs: lines are means over the seeds, bands (of
    up to six groups) reach from the lowest to the highest seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2 + 0.1 * len(study.groups)), layout="constrained")
        error, loss = figure.subplots(1, 2)
        band = len(study.groups) <= _BANDS
        looks = zip(_colors(study), nested_widths(len(study.groups)), study.groups, strict=True)
        for color, width, group in looks:
            look = {"color": color, "linewidth": width, "label": typeset(group.label)}
            errors = _over_epochs(group, "top1", lambda top1: 100 - top1)
            losses = _over_epochs(group, "loss", lambda value: value)
            _draw_mean(error, errors, look, band=band)
            _draw_mean(loss, losses, look, band=band)
        error.set_ylabel("top-1 error (%)")
        loss.set_ylabel("validation loss")
        for axes in (error, loss):
            axes.set_yscale("log")
            label_log_decades(axes.yaxis)
            axes.set_xlabel("epoch")
            axes.set_xlim(0)
        legend_once(figure, ncols=1 + (len(study.groups) > 1))
        return figure


def _over_epochs(group: Group, name: str, change: Callable[[float], float]) -> pd.DataFrame:
    """Values at the evaluations of a group by epoch (rows) and seed (columns), at the epochs at
    which all seeds were evaluated, or at all if there are none."""
    found = {
        run.config.seed: {
            row["epoch"]: change(row[name])
            for row in run.evaluations()
            if is_number(row.get("epoch")) and is_number(row.get(name))
        }
        for run in group.runs
    }
    table = pd.DataFrame(found).sort_index()
    common = table.dropna()
    return table if common.empty else common


def _draw_mean(axes: Axes, values: pd.DataFrame, look: dict[str, Any], *, band: bool) -> None:
    axes.plot(values.index, values.mean(axis=1), marker=".", **look)
    if band:
        low, high = values.min(axis=1), values.max(axis=1)
        axes.fill_between(values.index, low, high, color=look["color"], alpha=0.15, lw=0)


def schedule_figure(study: Study) -> Figure:
    """Learning rate and H of each group against steps, as planned."""
    return plan_figure({group.label: group.runs[0].plan for group in study.groups})


def top1_figure(study: Study) -> Figure:
    """Final top-1 of each group (dots are seeds, diamonds means with their 95 % intervals), and
    beside it the mean paired differences to the reference with theirs."""
    with mpl.rc_context(STYLE):
        both = study.reference is not None
        figure = Figure(figsize=(8.6, 1.3 + 0.4 * len(study.groups)), layout="constrained")
        axes = figure.subplots(1, 1 + both, sharey=True, squeeze=False)[0]
        for place, (color, group) in enumerate(zip(_colors(study), study.groups, strict=True)):
            values = _measured(group.runs, _TOP1.of)
            axes[0].plot(values, [place + 0.2] * len(values), ".", color=color, alpha=0.6)
            _draw_interval(axes[0], place, estimate(values), color)
            if study.reference is not None and group is not study.reference:
                change = difference(group, study.reference, _TOP1)
                _draw_interval(axes[1], place, change.difference, color)
        axes[0].set_xlabel("final top-1 (%)")
        axes[0].set_yticks(range(len(study.groups)), [typeset(g.label) for g in study.groups])
        axes[0].set_ylim(len(study.groups) - 0.5, -0.5)
        axes[0].grid(visible=False, axis="y")
        if study.reference is not None:
            axes[1].axvline(0, color="0.4", linewidth=1, zorder=1)
            axes[1].annotate(
                "reference",
                (0, study.groups.index(study.reference)),
                (5, 0),
                textcoords="offset points",
                va="center",
                color="0.4",
            )
            axes[1].set_xlabel("difference by seed (points)")
            axes[1].grid(visible=False, axis="y")
        return figure


def _draw_interval(axes: Axes, place: int, mean: Estimate, color: str) -> None:
    """A mean with its interval; without an interval where there is none."""
    width = mean.half_width if is_number(mean.half_width) else 0.0
    if is_number(mean.mean):
        axes.errorbar([mean.mean], [place], xerr=[width], color=color, **_MEAN)


def times_figure(study: Study) -> Figure:
    """A bar for each group, divided by where its time went, in the mean over its runs. What was not
    measured is part of computing."""
    return parts_figure({group.label: _parts(group) for group in study.groups})


def _parts(group: Group) -> dict[str, float]:
    """Mean seconds of each part."""
    training, waiting, communication, evaluation, checkpoints = (
        _mean(_measured(group.runs, metric.of)) for metric in TIMES
    )
    alone = all(run.summary.get("ranks") == 1 for run in group.runs)
    hidden = communication is None and not alone
    parts = {
        COMPUTING_AND_COMMUNICATION if hidden else COMPUTING: (training or 0.0)
        - (communication or 0.0)
        - (waiting or 0.0),
        COMMUNICATION: communication,
        WAITING: waiting,
        "evaluations": evaluation,
        "checkpoints": checkpoints,
    }
    return {name: value for name, value in parts.items() if value is not None}


def _measured(runs: Iterable[Run], value: Callable[[Run], float | None]) -> list[float]:
    return [found for run in runs if (found := value(run)) is not None]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _colors(study: Study) -> list[str]:
    return rule_colors([group.runs[0].plan.rule for group in study.groups])
