"""All records of the evidence -> the figures of docs/evidence*.md. Here: all comparisons with QSR,
and the choice of the rates."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from qsr.config.parsing import parse
from qsr.evidence.settings import SimulationConfig, make_simulated_plan
from qsr.report.evidence import DRIFT, Record, finite, unit
from qsr.report.evidence_contrasts import Contrast, contrasts, read_evidence
from qsr.report.evidence_plots import (
    AT_PEAK,
    PAPER_WORKERS,
    drift_figure,
    multiplier_figure,
    paper_plans,
    sensitivity_figure,
    simulation_figure,
)
from qsr.report.statistics import Estimate, estimate
from qsr.report.style import COLORS, STYLE, label_log_decades, legend_once, rule_colors, save
from qsr.report.symbols import typeset

_VERDICTS = {
    "QSR better": (COLORS[2], "o"),
    "not established": ("0.45", "s"),
    "QSR worse": (COLORS[3], "D"),
}
_LINES = ("o-", "o--", "o:")
"""Of arms whose rules are of one kind, in order."""
_ROW = 0.165
"""Height of a row, in inches."""


def draw(results: Path) -> None:
    """Draw the figures of docs/evidence*.md from the records in the folder results/, and save them
    beside these."""
    evidence = results / "evidence"
    folder = evidence / "simulations"
    found = read_evidence(results)
    records = found.simulations
    save(answers_figure(contrasts(found)), evidence / "answers")
    save(rates_figure(records["digits_mlp_rates"]), folder / "rates")
    for name in ("digits_mlp", "diagonal"):
        save(simulation_figure(records[name]), folder / name)
    save(sensitivity_figure(records), folder / "sensitivity")
    save(drift_figure(records[DRIFT]), folder / "drift")
    save(multiplier_figure(paper_plans(), PAPER_WORKERS, AT_PEAK), folder / "multiplier")


def relative(contrast: Contrast) -> Estimate:
    """The mean paired difference in percent of the larger of both mean errors, with its interval:
    by how much less QSR errs, or, if it is negative, the other."""
    difference = contrast.comparison.difference
    pairs = zip(contrast.other_errors, contrast.qsr_errors, strict=True)
    both = [pair for pair in pairs if None not in pair]
    scale = 100 / max(estimate(errors).mean for errors in zip(*both, strict=True))
    return Estimate(scale * difference.mean, scale * difference.half_width)


def answers_figure(found: Sequence[Contrast]) -> Figure:
    """One row per comparison, under its question: the other's error minus QSR's, with the 95 %
    interval. Comparisons in which the other always diverged are left out."""
    shown = [each for each in found if not math.isnan(each.comparison.difference.mean)]
    questions = list(dict.fromkeys(each.question for each in shown))
    rows = len(shown) + len(questions)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, _ROW * rows + 1.2), layout="constrained")
        axes = figure.subplots()
        places, names = [], []
        y = 0
        for question in questions:
            axes.annotate(
                question, (0, y), (-250, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", fontsize=8, fontweight="bold",
            )  # fmt: skip
            y += 1
            for each in (each for each in shown if each.question == question):
                color, marker = _VERDICTS[each.answer]
                seen = relative(each)
                axes.errorbar(
                    seen.mean, y, xerr=seen.half_width, fmt=marker, ms=4.5, capsize=2.5,
                    color=color, label=each.answer,
                )  # fmt: skip
                places.append(y)
                names.append(f"{typeset(each.other)} · {each.setting}")
                y += 1
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_yticks(places, names, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_ylim(y - 0.3, -0.7)
        axes.set_xlabel("the other's error minus QSR's, % of the larger of both (bars: 95 % CI)")
        axes.set_title("QSR worse ←      → QSR better", fontsize=8, color="0.35")
        legend_once(figure, ncols=3)
        return figure


def rates_figure(record: Record) -> Figure:
    """A simulation with a choice of rates: mean error of every arm over its peak rate, for the
    seeds (and images) that choose, where none of them diverged. A ring marks the chosen rate, a
    square with its 95 % interval the error there of the seeds (and images) that are reported."""
    config = parse(SimulationConfig, record["config"])
    drawn: Counter[str] = Counter()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, about in record["rules"].items():
            (color,) = rule_colors([make_simulated_plan(config, config.rules[name]).rule])
            means = {
                trial["peak_lr"]: estimate(trial["tuning_error"]).mean
                for trial in about["tried"]
                if None not in trial["tuning_error"]
            }
            axes.plot(
                list(means), list(means.values()), _LINES[drawn[color]], ms=3, color=color,
                label=typeset(name),
            )  # fmt: skip
            drawn[color] += 1
            chosen = about["peak_lr"]
            if chosen in means:
                axes.plot(chosen, means[chosen], "o", ms=9, fillstyle="none", color=color)
            seen = estimate(finite(about["test_error"]))
            axes.errorbar(chosen, seen.mean, seen.half_width, fmt="s", ms=4, capsize=3, color=color)
        axes.set_xscale("log")
        label_log_decades(axes.xaxis)
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel(f"test error{unit(record) or ' (squared error / 2)'}")
        legend_once(figure, ncols=4)
        return figure
