"""Single runs -> figures: their progress, and where their time went."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsr.report.collect import Run
from qsr.report.style import (
    COMMUNICATION,
    COMPUTING,
    COMPUTING_AND_COMMUNICATION,
    PART_STYLES,
    STYLE,
    label_log_decades,
    legend_once,
    nested_widths,
    rule_colors,
)
from qsr.report.symbols import typeset
from qsr.report.tables import time_unit

_LABEL_SIGNS = 48
"""Length of a line in a label beside a bar; symbols count as they are written in TeX."""


def loss_figure(runs: Mapping[str, Run]) -> Figure:
    """Training loss, validation loss and top-1 error against epochs. Hollow marks are evaluations
    in the middle of a round, of an average made only for them."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        training, validation, error = figure.subplots(1, 3)
        looks = zip(_colors(runs), nested_widths(len(runs)), strict=True)
        for (color, width), (label, run) in zip(looks, runs.items(), strict=True):
            trained = [row for row in run.metrics if row["kind"] == "train" and "loss" in row]
            evaluated = run.evaluations()
            training.plot([], [], color=color, label=typeset(label))
            _draw(training, trained, [row["loss"] for row in trained], color, width)
            _draw(validation, evaluated, [row["loss"] for row in evaluated], color, width)
            _draw(error, evaluated, [100 - row["top1"] for row in evaluated], color, width)
        training.plot([], [], "o", color="0.4", mfc="white", ms=4, label="in the middle of a round")
        training.set_ylabel("training loss")
        validation.set_ylabel("validation loss")
        error.set_ylabel("top-1 error (%)")
        error.set_yscale("log")
        label_log_decades(error.yaxis)
        for axes in (training, validation, error):
            axes.set_xlabel("epoch")
            axes.set_xlim(0)
        legend_once(figure, ncols=4)
        return figure


def _draw(
    axes: Axes, rows: list[dict[str, Any]], values: list[float], color: str, width: float
) -> None:
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, values, color=color, linewidth=width, zorder=1)
    fill = ["white" if row.get("shadow") else color for row in rows]
    size = (2.0 + 1.5 * width) ** 2  # nested as the lines are, so that none hides another
    axes.scatter(epochs, values, size, edgecolors=color, facecolors=fill, zorder=2)


def averages_figure(runs: Mapping[str, Run]) -> Figure:
    """Number of averages against steps: planned (lines) and counted in training (circles)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for color, (label, run) in zip(_colors(runs), runs.items(), strict=True):
            ends = [round_.end for round_ in run.plan.rounds()]
            axes.step(
                [0, *ends], range(len(ends) + 1), where="post", color=color, label=typeset(label)
            )
            counted = [(row["step"], row["averages"]) for row in run.metrics if "averages" in row]
            axes.plot(*zip(*counted, strict=True), "o", color=color, markerfacecolor="white")
        axes.plot([], [], "o", color="0.4", markerfacecolor="white", label="counted in the run")
        axes.set_xlabel("step")
        axes.set_ylabel("averages over the workers")
        legend_once(figure, ncols=2)
        return figure


def time_figure(runs: Mapping[str, Run]) -> Figure:
    """A bar for each run, divided by where its time went; the total is at its end."""
    return parts_figure({label: _seconds(run) for label, run in runs.items()})


def parts_figure(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each label, divided into parts of PART_STYLES, in seconds; the total is at its
    end."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.4 + 0.35 * len(seconds)), layout="constrained")
        axes = figure.subplots()
        parts = pd.DataFrame(seconds).T
        unit, seconds_per_unit = time_unit(parts.sum(axis=1).max())
        parts /= seconds_per_unit
        ends = np.zeros(len(seconds))
        for name, style in PART_STYLES.items():
            if name in parts:
                widths = parts[name].fillna(0)
                axes.barh(range(len(seconds)), widths, 0.6, left=ends, label=name, **style)
                ends += widths
        for place, end in enumerate(ends):
            axes.annotate(
                f"{end:.1f}", (end, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(seconds)), [_folded(typeset(label)) for label in seconds])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"time ({unit})")
        legend_once(figure, ncols=3)
        return figure


def _folded(label: str) -> str:
    """A label beside a bar, which must leave room for it."""
    lines = [""]
    for piece in label.split(", "):
        together = ", ".join(filter(None, [lines[-1], piece]))
        lines[-1:] = [together] if len(together) <= _LABEL_SIGNS else [f"{lines[-1]},", piece]
    return "\n".join(line for line in lines if line != ",")


def _seconds(run: Run) -> dict[str, float]:
    """Seconds for each part of the run."""
    summary = run.summary
    communication = summary.get("communication_seconds")
    if communication is None:
        training = {COMPUTING_AND_COMMUNICATION: summary["train_seconds"]}
    else:
        training = {
            COMPUTING: summary["train_seconds"] - communication,
            COMMUNICATION: communication,
        }
    return training | {
        "evaluations": summary["evaluation_seconds"],
        "checkpoints": summary["checkpoint_seconds"],
    }


def _colors(runs: Mapping[str, Run]) -> list[str]:
    return rule_colors([run.plan.rule for run in runs.values()])
