"""Results of scripts/simulate.py, and predictions of the theory for a run -> figures."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsr.config.parsing import parse
from qsr.core.drift import drift_multiplier, psi, psi_discrete
from qsr.core.plan import Plan
from qsr.evidence.settings import SimulationConfig, make_simulated_plan
from qsr.report.evidence import Record, finite, unit
from qsr.report.plans import experiment_plan
from qsr.report.statistics import estimate
from qsr.report.style import (
    COLORS,
    STYLE,
    label_log_decades,
    legend_once,
    nested_widths,
    rule_colors,
)
from qsr.report.symbols import typeset

PAPER_WORKERS = 16
"""Workers of the run in the figure of the multiplier."""
AT_PEAK = 1.0
"""2 H lr eigenvalue in the first round, chosen so that a round at the peak is as long as
fluctuations take to build up. The paper's networks have many smaller and larger eigenvalues."""
_INTERVALS = "squares: means with 95 % CI, dots: {} seeds"
_POINTS = 2000
"""Points of a curve over a run's steps."""


def paper_plans() -> dict[str, Plan]:
    """The paper's ViT-B run on 16 workers under several rules. Their coefficients are not the
    paper's: they are chosen so that all rules begin with H = 4 at the peak rate of 0.008."""
    runs = {
        "constant H": ("constant_h4",),
        "data parallel": ("parallel",),
        "beta/eta": ("inverse_h4", f"sync.coefficient={4 * 0.008}"),
        "QSR": ("quadratic_h4", f"sync.alpha={2 * 0.008}"),
        "cubic": ("cubic_h4", f"sync.coefficient={4 ** (1 / 3) * 0.008}"),
    }
    return {
        label: experiment_plan(f"vit_b16_b4096/{row}", *settings)
        for label, (row, *settings) in runs.items()
    }


def simulation_figure(record: Record) -> Figure:
    """Test error and tr(Hessian) against the volume: a dot for every seed, and the means and 95 %
    intervals of the rules. Rules that diverged with all seeds are left out."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        test, trace = figure.subplots(1, 2)
        _draw_rules(test, record, "test_error")
        _draw_rules(trace, record, "hessian_trace")
        test.set_ylabel(f"test error{_unit(record)}")
        trace.set_ylabel("tr(Hessian) of the training loss")
        for axes in (test, trace):
            axes.set_xscale("log")
            label_log_decades(axes.xaxis)
            axes.set_xlabel("communication volume: averages / steps")
        trace.set_title(_INTERVALS.format(record["config"]["seeds"]), fontsize=8, loc="right")
        legend_once(figure, ncols=5)
        return figure


def _draw_rules(axes: Axes, record: Record, quantity: str) -> None:
    rules = list(zip(_colors(record), record["rules"].items(), strict=True))
    rules.sort(key=lambda rule: -rule[1][1]["volume"])
    for color, (name, about) in rules:
        values = finite(about[quantity])
        if not values:
            continue
        volume, mean = about["volume"], estimate(values)
        axes.plot([volume] * len(values), values, "o", ms=2.5, color=color, alpha=0.35)
        axes.errorbar(
            volume, mean.mean, mean.half_width, fmt="s", ms=5, capsize=4, color=color,
            label=typeset(name),
        )  # fmt: skip


def _colors(record: Record) -> list[str]:
    config = parse(SimulationConfig, record["config"])
    return rule_colors([make_simulated_plan(config, rule).rule for rule in config.rules.values()])


def _unit(record: Record) -> str:
    return unit(record) or " (squared error / 2)"


def sensitivity_figure(records: Mapping[str, Record]) -> Figure:
    """Test error of the rules against the number of workers, and of QSR against its alpha: means
    and 95 % intervals over the seeds that did not diverge, with the number of those that did.
    `records`: all simulations."""
    names = ("digits_mlp_4_workers", "digits_mlp_8_workers", "digits_mlp")
    by_workers = {records[name]["config"]["workers"]: records[name] for name in names}
    by_scale = records["digits_mlp_alpha"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        workers = sorted(by_workers)
        first = by_workers[workers[0]]
        look = dict(zip(first["rules"], _colors(first), strict=True))
        order = sorted(look, key=lambda name: -first["rules"][name]["volume"])
        for name in order:
            values = [by_workers[k]["rules"][name]["test_error"] for k in workers]
            means = [estimate(finite(each)) for each in values]
            left.errorbar(
                workers,
                [each.mean for each in means],
                [each.half_width for each in means],
                fmt="s-", ms=4, capsize=3, color=look[name], label=typeset(name),
            )  # fmt: skip
        left.set_xscale("log", base=2)
        left.set_xticks(workers, map(str, workers))
        left.set_xlim(workers[0] / 1.2, workers[-1] * 1.2)
        left.set_ylim(17)
        for k in workers:
            _note_diverged(left, by_workers[k], order, k / 1.15)
        left.set_xlabel("workers $K$, each with the same local batch")
        left.set_ylabel(f"test error{_unit(first)}")
        scales = [rule["scale"] for rule in by_scale["config"]["rules"].values()]
        for scale, (name, about) in zip(scales, by_scale["rules"].items(), strict=True):
            values = finite(about["test_error"])
            if values:
                mean = estimate(values)
                bar = {"fmt": "s", "ms": 4, "capsize": 3, "color": COLORS[2]}
                right.errorbar(scale, mean.mean, mean.half_width, **bar)
            _note_diverged(right, by_scale, [name], scale)
        right.set_xticks(scales, [f"{scale:g}" for scale in scales])
        right.set_xlim(0.1, 1.75)
        right.set_xlabel(r"$\alpha$ of QSR; 1: $H = H_\mathrm{base}$ up to the peak")
        title = f"means with 95 % CI over {first['config']['seeds']} seeds"
        right.set_title(title, fontsize=8, loc="right")
        legend_once(figure, ncols=5)
        return figure


def _note_diverged(axes: Axes, record: Record, rules: Sequence[str], place: float) -> None:
    """Say above the axis, at this place, which of the rules diverged with how many seeds."""
    counts: dict[int, list[str]] = {}
    for rule in rules:
        counts.setdefault(record["rules"][rule]["diverged"], []).append(typeset(rule))
    of = record["config"]["seeds"]
    lines = [
        f"{count} of {of}\ndiverged"
        if len(rules) == 1
        else f"{count} of {of} diverged with\n{', '.join(names)}"
        for count, names in counts.items()
        if count
    ]
    axes.annotate(
        "\n".join(lines), (place, 0), (0, 3), xycoords=axes.get_xaxis_transform(),
        textcoords="offset points", ha="center" if len(rules) == 1 else "left", fontsize=7,
        color="0.35",
    )  # fmt: skip


def drift_figure(record: Record) -> Figure:
    """Left: drift of the model with one eigenvalue relative to that of data parallel training,
    measured (points), predicted for steps of finite size (lines), and by the slow SDE (dotted).
    Right: measured / predicted with growing noise, until the expansion no longer holds."""
    rows = pd.DataFrame(record["rows"])
    (eigenvalue,) = record["valleys"]["one eigenvalue"]["eigenvalues"]
    one = rows[(rows["valley"] == "one eigenvalue") & (rows["h"] > 1)]
    small = one[one["noise"] == one["noise"].min()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = np.geomspace(0.005, 200, 400)
        for color, (workers, part) in zip(COLORS, small.groupby("workers"), strict=False):
            for marker, (lr, of) in zip("o^", part.groupby("lr"), strict=True):
                label = f"$K = {workers}$" if marker == "o" else None
                at = 2 * of["h"] * lr * eigenvalue
                left.plot(at, of["multiplier"], marker, ms=4, color=color, label=label)
                h = at.to_numpy() / (2 * lr * eigenvalue)
                lengths = np.geomspace(h.min(), h.max(), 100)
                curve = [
                    drift_multiplier(workers, psi_discrete(float(each), lr, eigenvalue))
                    for each in lengths
                ]
                left.plot(2 * lengths * lr * eigenvalue, curve, color=color, linewidth=1)
            slow = [drift_multiplier(workers, psi(float(each))) for each in x]
            left.plot(x, slow, ":", color=color, linewidth=1)
        for marker, lr in zip("o^", sorted(small["lr"].unique()), strict=True):
            left.plot([], [], marker, ms=4, color="0.4", label=f"measured, lr = {lr:g}")
        left.plot([], [], color="0.4", linewidth=1, label="predicted, steps of finite size")
        left.plot([], [], ":", color="0.4", linewidth=1, label="predicted, slow SDE")
        left.set_xscale("log")
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_ylabel("drift, relative to data parallel training")
        left.set_xlabel(r"$2\,H\,\mathrm{lr}\,\lambda$, with the eigenvalue $\lambda$")
        noisy = one[(one["workers"] == 8) & (one["lr"] == one["lr"].max())]
        for grey, (noise, of) in zip(
            ("0.0", "0.35", "0.55", "0.75"), noisy.groupby("noise"), strict=True
        ):
            share = 100 * of["multiplier"] / of["predicted_discrete"]
            bars = 100 * of["standard_error"] / of["predicted_discrete"]
            right.errorbar(of["h"], share, bars, fmt="o-", ms=3, color=grey, label=f"noise {noise}")
        right.axhspan(95, 105, color=COLORS[5], alpha=0.2, linewidth=0, label="within 5 %")
        right.set_xscale("log", base=2)
        right.set_xlabel("$H$, at $K = 8$ and lr = 0.02")
        right.set_ylabel("drift: measured / predicted (%)")
        right.set_ylim(0)
        right.set_title("bars: standard errors", fontsize=8, loc="right")
        legend_once(figure, ncols=4)
        return figure


def multiplier_figure(plans: Mapping[str, Plan], workers: int, at_peak: float) -> Figure:
    """The effect of each rule in a run: the multiplier of the drift towards flat minima, for an
    eigenvalue with 2 H lr eigenvalue = `at_peak` in the first plan's first round, and the movement
    along the minima in a round, H lr^2 relative to that round."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 6.2), layout="constrained")
        rate, drift, moved = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2, 2])
        colors = rule_colors([plan.rule for plan in plans.values()])
        widths = nested_widths(len(plans))
        first = next(iter(plans.values()))
        schedule, total = first.schedule, first.total_steps
        steps = np.unique(np.linspace(0, total - 1, _POINTS).astype(int))
        progress = 100 * steps / total
        peak = max(schedule(int(step)) for step in steps)
        eigenvalue = at_peak / (2 * first.round_at(0).length * peak)
        rates = np.array([schedule(int(step)) for step in steps])
        rate.plot(progress, rates / peak, color="0.25")
        rate.set_ylabel("lr / peak")
        for color, width, (name, plan) in zip(colors, widths, plans.items(), strict=True):
            lengths = np.array([plan.round_at(int(step)).length for step in steps])
            gains = [
                drift_multiplier(workers, 0.0 if h == 1 else psi(2 * h * lr * eigenvalue))
                for h, lr in zip(lengths, rates, strict=True)
            ]
            style = {"color": color, "linewidth": width}
            drift.plot(progress, gains, label=typeset(name), **style)
            along = lengths * rates**2 / (first.round_at(0).length * peak**2)
            moved.plot(progress, along, **style)
        drift.set_ylabel(f"drift to flat minima,\nrelative to data parallel\n($K = {workers}$)")
        drift.set_ylim(0, 1.05 * workers)
        moved.set_yscale("log")
        moved.set_ylim(1e-4, 30)
        moved.set_ylabel(
            "distance that a round moves\nalong the minima:\n"
            + r"$H\,\mathrm{lr}^2$ (1: at the peak)"
        )
        moved.set_xlabel("training done (%)")
        legend_once(figure, ncols=3)
        return figure
