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
from qsr.report.style import (
    COLORS,
    STYLE,
    label_log_decades,
    label_log_ticks,
    legend_once,
    rule_colors,
)
from qsr.report.symbols import typeset

_BESIDE = 1.12
"""Factor from a mean to the outermost seeds, which are drawn beside each other."""
_VOLUMES = (5, 10, 25, 50, 100)
"""Ticks of the communication axis, in percent."""


def schedule_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Learning rate, and H of each rule, against the steps of the runs."""
    return plan_figure({label: runs[0].plan for label, runs in groups.items()})


def accuracy_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """What a rule's averages buy: top-1 error over the averages made so far (mean and range over
    the seeds), and the final top-1 over the communication volume."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        colors = rule_colors([runs[0].plan.rule for runs in groups.values()])
        for color, (label, runs) in zip(colors, groups.items(), strict=True):
            error = 100 - pd.DataFrame(
                {
                    run.summary["seed"]: {row["step"]: row["top1"] for row in run.evaluations()}
                    for run in runs
                }
            )
            ends = [round_.end for round_ in runs[0].plan.rounds()]
            averages = np.searchsorted(ends, error.index, side="right")
            left.plot(averages, error.mean(axis=1), color=color, label=typeset(label), marker=".")
            left.fill_between(
                averages, error.min(axis=1), error.max(axis=1), color=color, alpha=0.15, lw=0
            )
            left.annotate(
                f"{averages[-1]:,} averages", (averages[-1], error.mean(axis=1).iloc[-1]), (6, -30),
                textcoords="offset points", ha="right", fontsize=8, color=color,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
            volume = 100 * runs[0].summary["volume"]
            top1 = sorted(run.summary["top1"] for run in runs)
            beside = volume * _BESIDE ** np.linspace(-1, 1, len(top1))
            right.plot(beside, top1, ".", color=color, alpha=0.6, markersize=6)
            right.plot(volume, np.mean(top1), "D", color=color, markersize=6, mfc="none")
        left.set_title("lines: means, bands: ranges over the seeds", fontsize=8, loc="right")
        right.set_title("diamonds: means, dots: seeds side by side", fontsize=8, loc="right")
        left.set_xlabel("averages so far")
        left.set_ylabel("top-1 error (%)")
        left.set_xscale("log")
        label_log_decades(left.xaxis)
        left.set_yscale("log")
        label_log_ticks(left.yaxis, (1, 2, 5, 10, 20, 50))
        right.set_xscale("log")
        label_log_ticks(right.xaxis, _VOLUMES)
        right.set_xlim(_VOLUMES[0], 130)
        right.set_xlabel("communication volume (% of data parallel)")
        right.set_ylabel("final top-1 (%)")
        right.margins(y=0.15)
        legend_once(figure, ncols=3)
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
        figure = Figure(figsize=(4.7 * columns, 3.0 * rows + 0.6), layout="constrained")
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
        if values == "here":
            seeds = "/".join(f"{count:.0f}" for count in sorted(table["seeds"].dropna().unique()))
            title += f"\nmarks: means over {seeds} seeds, bars: standard deviations"
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
                # beyond the bars, or away from the line to its partner: neither strikes a label
                up = 1 if (rule == "constant") == own else -1
                h = "H" if rule == "constant" else "H_\\mathrm{base}"
                bar = row["top1_std"] if own else 0.0
                axes.annotate(
                    f"${h} = {row['h_base']}$",
                    (row[volume], row[top1] + up * bar),
                    xytext=(6 if own and up > 0 else 0, 4 * up if own else 6 * up),
                    textcoords="offset points",
                    horizontalalignment="right" if own and up > 0 else "center",
                    verticalalignment="bottom" if up > 0 else "top",
                    fontsize=6.5,
                    color="0.35",
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )


_RULES = {
    "parallel": ("data parallel", "s"),
    "constant": ("constant $H$", "o"),
    "quadratic": ("QSR", "D"),
}
