"""Plans -> figures: the learning rate, and the rounds of each rule."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsr.core.plan import Plan
from qsr.core.rules import UNTIL_THE_END, Rule
from qsr.report.style import STYLE, legend_once, nested_widths, rule_colors
from qsr.report.symbols import typeset

_MARKED_ROUNDS = 1000
"""Plans with more rounds get no marks, which would cover everything else."""
_DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), "-", (0, (2, 1.5)))
"""Of plans with schedules of their own."""


def plan_figure(plans: Mapping[str, Plan], steps_per_epoch: int | None = None) -> Figure:
    """Learning rate, and H of each plan, against steps, or against epochs and steps if the length
    of an epoch is given. A schedule that all plans share is drawn once, in grey."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.7), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
        shared = len({plan.schedule for plan in plans.values()}) == 1
        colors = rule_colors([plan.rule for plan in plans.values()])
        widths = nested_widths(len(plans))
        for color, width, (label, plan) in zip(colors, widths, plans.items(), strict=True):
            if not (shared and top.lines):
                rates = [plan.schedule(step) for step in range(plan.total_steps)]
                epochs = np.arange(plan.total_steps) / (steps_per_epoch or 1)
                line = {"color": "0.25"} if shared else {"color": color, "linewidth": width}
                top.plot(epochs, rates, **line)
            volume = f"{plan.num_rounds:,} rounds, volume {100 * plan.volume:.1f} %"
            _draw_h(bottom, plan, steps_per_epoch, color, width, f"{typeset(label)}: {volume}")
        if not shared:  # then lines coincide in long parts of the run
            for style, line, stairs in zip(cycle(_DASHES), top.lines, bottom.patches, strict=False):
                line.set_linestyle(style)
                stairs.set_linestyle(style)
        top.set_ylabel("learning rate")
        top.set_ylim(0)
        bottom.margins(x=0)
        bottom.set_xlabel("step")
        if steps_per_epoch is not None:
            bottom.set_xlabel("epoch")
            steps = (lambda epoch: epoch * steps_per_epoch, lambda step: step / steps_per_epoch)
            axis = top.secondary_xaxis("top", functions=steps)
            axis.set_xlabel("step")
            axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        bottom.set_ylabel("$H$ (local steps)")
        _scale_h(bottom)
        legend_once(figure, ncols=1)
        return figure


def length_figure(rules: Mapping[str, Rule], peak_lr: float) -> Figure:
    """H of each rule against the learning rate, from the peak (left) to 1/32 of it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        shares = np.geomspace(1, 1 / 32, 2001)
        colors = rule_colors(list(rules.values()))
        for color, (label, rule) in zip(colors, rules.items(), strict=True):
            lengths = [_length(rule, 0, peak_lr * float(share)) for share in shares]
            axes.plot(shares, lengths, color=color)
            end = (float(shares[-1]), lengths[-1])
            axes.annotate(
                typeset(label), end, (4, 0), textcoords="offset points", color=color, va="center"
            ).set_annotation_clip(False)
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, 1 / 32)
        ticks = {2.0**-power: f"1/{2**power}" for power in range(1, 6)}
        axes.set_xticks([1, *ticks], ["peak", *ticks.values()])
        axes.set_xlabel("learning rate of the round's first step, in parts of the peak")
        axes.set_ylabel("$H$ (local steps)")
        _scale_h(axes)
        return figure


def borders_figure(plan: Plan, steps_per_epoch: int) -> Figure:
    """Where H of a plan with a warm-up differs from the rule: in the warm-up (left), and in the
    last round (right, which shows the last fifth of the run)."""
    total, warmup = plan.total_steps, plan.schedule.warmup_steps
    last = plan.round_at(total - 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, (start, end) in ((left, (0, 2 * warmup)), (right, (total - total // 5, total))):
            steps = range(start, end, max(1, (end - start) // 500))
            asked = [_length(plan.rule, step, plan.schedule(step)) for step in steps]
            epochs = np.array(steps) / steps_per_epoch
            axes.plot(epochs, asked, "--", color="0.4", label="the rule at each step's own rate")
            _draw_h(axes, plan, steps_per_epoch, rule_colors([plan.rule])[0], 1.8, "the plan")
            axes.set_xlim(start / steps_per_epoch, end / steps_per_epoch)
            axes.set_xlabel("epoch")
            _scale_h(axes)
        left.set_ylabel("$H$ (local steps)")
        left.set_ylim(plan.round_at(0).length / 2, 8 * plan.longest_round.length)
        left.axvspan(0, warmup / steps_per_epoch, color="0.94", zorder=0)
        left.text(0.5, 0.02, "warm-up", transform=left.get_xaxis_transform(), color="0.4")
        right.legend(loc="lower right")
        middle = ((last.start + last.end) / 2 / steps_per_epoch, last.length)
        asked_last = _length(plan.rule, last.start, last.lr)
        right.annotate(
            f"last round: {last.length:,} steps,\nthe rule asks for {asked_last:,g}",
            middle, (0, -6), textcoords="offset points", ha="center", va="top",
        )  # fmt: skip
        return figure


def _length(rule: Rule, step: int, lr: float) -> float:
    length = rule.length(step, lr)
    return np.inf if length is UNTIL_THE_END else length


def _draw_h(
    axes: Axes, plan: Plan, steps_per_epoch: int | None, color: str, width: float, label: str
) -> None:
    rounds = list(plan.rounds())
    lengths = [round_.length for round_ in rounds]
    starts = [round_.start for round_ in rounds]
    edges = np.array([*starts, plan.total_steps]) / (steps_per_epoch or 1)
    axes.stairs(lengths, edges, baseline=None, color=color, linewidth=width, label=label)
    # a mark at every average shows how they become rarer
    if len(rounds) <= _MARKED_ROUNDS:
        axes.plot(edges[1:], lengths, ".", color=color, markersize=4, clip_on=False)


def _scale_h(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda h, _: f"{h:,g}")
