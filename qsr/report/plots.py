"""Records -> figures."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from qsr.report.collect import Run
from qsr.report.plan_plots import plan_figure
from qsr.report.style import COLORS, STYLE, label_log_ticks, legend_once, rule_colors

_VOLUMES = (5, 10, 25, 50, 100)
"""Ticks of the communication axis, in percent."""


def schedule_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Learning rate, and H of each rule, against the steps of the runs."""
    return plan_figure({label: runs[0].plan for label, runs in groups.items()})


def accuracy_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Top-1 error against steps (mean and range over the seeds), and final top-1 against
    communication."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        colors = rule_colors([runs[0].plan.rule for runs in groups.values()])
        for color, (label, runs) in zip(colors, groups.items(), strict=True):
            error = 100 - pd.DataFrame(
                {
                    run.summary["seed"]: {row["step"]: row["top1"] for row in run.evaluations()}
                    for run in runs
                }
            )
            left.plot(error.index, error.mean(axis=1), color=color, label=label, marker=".")
            left.fill_between(
                error.index, error.min(axis=1), error.max(axis=1), color=color, alpha=0.15, lw=0
            )
            volume = [100 * run.summary["volume"] for run in runs]
            top1 = [run.summary["top1"] for run in runs]
            right.plot(volume, top1, ".", color=color, alpha=0.5, markersize=5)
            right.plot(np.mean(volume), np.mean(top1), "D", color=color, markersize=6)
        left.set_title("mean and range over the seeds", fontsize=8, loc="right")
        right.set_title("diamond: mean, dots: seeds", fontsize=8, loc="right")
        left.set_xlabel("step")
        left.set_ylabel("top-1 error (%)")
        left.set_yscale("log")
        label_log_ticks(left.yaxis, (1, 2, 5, 10, 20, 50))
        left.legend()
        right.set_xscale("log")
        label_log_ticks(right.xaxis, _VOLUMES)
        right.set_xlabel("communication volume (% of data parallel)")
        right.set_ylabel("final top-1 (%)")
        return figure


def communication_figure(table: pd.DataFrame, *, values: str, title: str = "") -> Figure:
    """Top-1 against communication volume, with a panel for each table of the paper.

    `table` is a comparison_table; `values` is "paper" (unverified values are hollow) or "here"
    (mean and standard deviation over the seeds). A line joins each QSR point with the constant H
    that equals its H_base.
    """
    with mpl.rc_context(STYLE):
        panels = table.groupby("table", sort=False)
        columns = min(2, panels.ngroups)
        rows = math.ceil(panels.ngroups / columns)
        figure = Figure(figsize=(4.3 * columns, 3.0 * rows + 0.4), layout="constrained")
        for place, (name, part) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            batch = f"{part['global_batch'].iloc[0]:,}"
            axes.set_title(f"{name}: {part['model'].iloc[0]}, B = {batch}", fontsize=9)
            _draw_rows(axes, part, values)
            axes.set_xscale("log")
            label_log_ticks(axes.xaxis, _VOLUMES)
            axes.set_xlim(3.5, 130)
            axes.margins(y=0.15)
            if place > panels.ngroups - columns:
                axes.set_xlabel("communication volume (% of data parallel)")
            if place % columns == 1 % columns:
                axes.set_ylabel("top-1 (%)")
        legend_once(figure, ncols=3, by_label=True)
        figure.suptitle(title, fontsize=9, weight="bold")
        return figure


def _draw_rows(axes: Axes, rows: pd.DataFrame, values: str) -> None:
    own = values == "here"
    volume = "volume_percent_mean" if own else "volume_percent_plan"
    top1 = "top1_mean" if own else "top1_paper"
    for _, pair in rows[rows["rule"] != "parallel"].groupby("h_base"):
        axes.plot(pair[volume], pair[top1], color="0.7", linewidth=1, zorder=1)
    for color, (rule, (label, marker)) in zip(COLORS, _RULES.items(), strict=False):
        for row in rows[rows["rule"] == rule].to_dict("records"):
            hollow = not own and row["top1_tag"] == "R"
            axes.errorbar(
                row[volume],
                row[top1],
                yerr=row["top1_std"] if own else None,
                color=color,
                marker=marker,
                markersize=6,
                markerfacecolor="white" if hollow else color,
                capsize=2,
                elinewidth=1,
                linestyle="none",
                label=label + (" (unverified)" if hollow else ""),
            )
            if rule != "parallel" and not pd.isna(row[top1]):
                # QSR lies left of its constant H: labels on opposite sides do not overlap
                constant = rule == "constant"
                h = "H" if constant else "H_\\mathrm{base}"
                axes.annotate(
                    f"${h} = {row['h_base']}$",
                    (row[volume], row[top1]),
                    xytext=(6, 1) if constant else (-6, -1),
                    textcoords="offset points",
                    horizontalalignment="left" if constant else "right",
                    verticalalignment="bottom" if constant else "top",
                    fontsize=7,
                    color="0.35",
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )


_RULES = {
    "parallel": ("data parallel", "s"),
    "constant": ("constant H", "o"),
    "quadratic": ("QSR", "D"),
}
