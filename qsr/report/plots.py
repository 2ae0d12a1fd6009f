"""Records -> pictures."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsr.core.plan import Plan
from qsr.report import what_if
from qsr.report.collect import Run

# Okabe and Ito's palette: told apart by colour-blind readers too
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "qsr",  # the same picture gives the same file
}


def schedule_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Learning rate, and H under each rule, over the steps of the runs."""
    return plan_figure({label: runs[0].plan for label, runs in groups.items()})


def plan_figure(plans: Mapping[str, Plan], steps_per_epoch: int | None = None) -> Figure:
    """Learning rate and H of each plan over the steps, and over the epochs where their length is
    given. A schedule that all plans share is drawn once, in grey."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
        shared = len({plan.schedule for plan in plans.values()}) == 1
        for color, (label, plan) in zip(cycle(COLORS), plans.items(), strict=False):
            if not (shared and top.lines):
                rates = [plan.schedule(step) for step in range(plan.total_steps)]
                top.plot(rates, color="0.25" if shared else color)
            _draw_h(bottom, plan, label, color)
        if steps_per_epoch is not None:
            epochs = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
            top.secondary_xaxis("top", functions=epochs).set_xlabel("epoch")
        top.set_ylabel("learning rate")
        bottom.set_ylabel("H (local steps)")
        bottom.set_xlabel("step")
        bottom.set_yscale("log", base=2)
        bottom.yaxis.set_major_formatter(lambda h, _: f"{h:g}")
        figure.legend(loc="outside lower center")
        return figure


def _draw_h(axes: Axes, plan: Plan, label: str, color: str) -> None:
    rounds = list(plan.rounds())
    edges = [round_.start for round_ in rounds] + [plan.total_steps]
    axes.stairs([round_.length for round_ in rounds], edges, baseline=None, color=color)
    # a mark at every average, so that the thinning is seen
    axes.plot(
        edges[1:],
        [round_.length for round_ in rounds],
        linestyle="none",
        marker=".",
        markersize=3,
        color=color,
        rasterized=plan.num_rounds > 1000,  # as points of an SVG they would take megabytes
        label=f"{label}: {plan.num_rounds} rounds, volume {100 * plan.volume:.1f} %",
    )


def accuracy_figure(groups: Mapping[str, Sequence[Run]]) -> Figure:
    """Top-1 error over the steps (mean, and the range over the seeds), and final top-1 over
    communication."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for color, (label, runs) in zip(cycle(COLORS), groups.items(), strict=False):
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
        left.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        left.set_yticks(ticks := [1, 2, 5, 10, 20, 50], [str(tick) for tick in ticks])
        left.legend()
        right.set_xscale("log")
        right.set_xticks(ticks := [5, 10, 25, 50, 100], [str(tick) for tick in ticks])
        right.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        right.set_xlabel("communication volume (% of data parallel)")
        right.set_ylabel("final top-1 (%)")
        return figure


def communication_figure(table: pd.DataFrame, *, values: str, title: str = "") -> Figure:
    """Top-1 over communication volume, a panel for each table of the paper.

    `table` is a comparison_table; `values` says whose: "paper" (unverified values hollow) or
    "here" (mean and standard deviation over the seeds). QSR's points are joined to the constant H
    that has their H_base.
    """
    with mpl.rc_context(STYLE):
        panels = table.groupby("table", sort=False)
        figure = Figure(figsize=(3.1 * panels.ngroups + 0.4, 3.4), layout="constrained")
        axes = figure.subplots(1, panels.ngroups, squeeze=False)[0]
        for axis, (name, part) in zip(axes, panels, strict=True):
            batch = f"{part['global_batch'].iloc[0]:,}".replace(",", " ")
            axis.set_title(f"{name}: {part['model'].iloc[0]}, B = {batch}", fontsize=9)
            _draw_rows(axis, part, values)
            axis.set_xscale("log")
            axis.set_xticks(ticks := [5, 10, 25, 50, 100], [str(tick) for tick in ticks])
            axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            axis.set_xlim(5, 130)
            axis.set_xlabel("communication volume (%)")
        axes[0].set_ylabel("top-1 (%)")
        handles = {label: line for axis in axes for line, label in _handles(axis)}
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles)
        )
        figure.suptitle(title, fontsize=9)
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
                linestyle="none",
                label=label + (" (unverified)" if hollow else ""),
            )
            if rule != "parallel" and not pd.isna(row[top1]):
                place: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, 4)}
                axes.annotate(
                    str(row["h_base"]), (row[volume], row[top1]), **place, fontsize=7, color="0.35"
                )


_RULES = {
    "parallel": ("data parallel", "s"),
    "constant": ("constant H", "o"),
    "quadratic": ("QSR", "D"),
}


def _handles(axes: Axes) -> list[tuple[Any, str]]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


def what_if_figure() -> Figure:
    """Time that QSR saves of overlapped data parallel training over the link of a machine, for
    the fewest and the most workers, a panel for each GPU."""
    links = np.geomspace(what_if.LINKS_GBIT_PER_SECOND[0], what_if.LINKS_GBIT_PER_SECOND[-1], 400)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        panels = figure.subplots(1, len(what_if.GPUS), sharey=True)
        for axes, gpu in zip(panels, what_if.GPUS, strict=True):
            for number, network in enumerate(what_if.networks()):
                name = network.name + (" (speed unverified)" if network.unverified else "")
                for workers, style in ((what_if.WORKERS[0], "-"), (what_if.WORKERS[-1], ":")):
                    cases = [what_if.case(network, gpu, workers, float(link)) for link in links]
                    saved = [100 * case.saved_of_overlapped for case in cases]
                    axes.plot(
                        links,
                        saved,
                        style,
                        color=COLORS[number],
                        linewidth=1.5 if number else 3.2,  # another coincides with the first
                        label=name if style == "-" else None,
                    )
            axes.axhline(0, color="0.25", linewidth=0.8)
            axes.set_title(gpu, fontsize=9)
            axes.set_xscale("log")
            axes.set_xticks(ticks := [1, 3, 10, 30, 100, 300], [str(tick) for tick in ticks])
            axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            axes.set_xlabel("effective link of a machine (Gbit/s)")
        panels[0].set_ylabel("time saved by QSR (%)\nof overlapped data parallel training")
        panels[0].legend(
            title=f"solid: {what_if.WORKERS[0]} workers, dotted: {what_if.WORKERS[-1]:,}"
        )
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.svg."""
    with mpl.rc_context(STYLE):
        figure.savefig(path.with_name(path.name + ".png"), dpi=160)
        figure.savefig(path.with_name(path.name + ".svg"), dpi=160, metadata={"Date": None})
