"""Results of benchmarks/ -> figures."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from qsr.report.speed import Record
from qsr.report.style import COLORS, STYLE, label_log_decades, legend_once
from qsr.report.symbols import typeset

_METHOD_COLORS = (COLORS[0], COLORS[1], COLORS[2], COLORS[3])


def slow_link_figure(record: Record) -> Figure:
    """Time relative to blocking data parallel training against the share of communication in that
    training: measured (median, quartiles), predicted, and the paper's."""
    shares = record["shares"]
    blocking, *names = shares[0]["methods"]
    x = [100 * row["measured_share"]["median"] for row in shares]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.8), layout="constrained")
        axes = figure.subplots()
        for name, color in zip(names, _METHOD_COLORS, strict=False):
            found = [row["methods"][name] for row in shares]
            middle = np.array([about["relative"]["median"] for about in found])
            quartiles = np.array([about["relative"]["quartiles"] for about in found])
            bars = np.abs(quartiles.T - middle)
            axes.errorbar(x, middle, bars, fmt="o", ms=5, color=color, label=typeset(name))
            predicted = [about["predicted_relative"]["median"] for about in found]
            axes.plot(x, predicted, color=color, linewidth=1)
        axes.axhline(1.0, color="0.5", linewidth=1, linestyle=":", label=blocking)
        axes.plot([], [], color="0.4", linewidth=1, label="predicted")
        paper = [
            (100 * row["share"], row["published_relative"])
            for row in shares
            if row["published_relative"] is not None
        ]
        there = list(zip(*paper, strict=True))
        axes.plot(*there, "D", ms=7, mfc="none", color="black", label="the paper's QSR")
        axes.set_xlim(0)
        axes.set_ylim(0, 1.15)
        axes.set_xlabel("share of communication in blocking data parallel training (%)")
        repetitions = shares[0]["methods"][names[0]]["relative"]["repetitions"]
        title = f"points: medians of {repetitions} repetitions, bars: quartiles"
        axes.set_title(title, fontsize=8, loc="right")
        axes.set_ylabel("time, relative to\nblocking data parallel training")
        legend_once(figure, ncols=3)
        return figure


def average_figure(record: Record) -> Figure:
    """Time and extra memory of one average for each implementation."""
    contenders = record["contenders"]
    names = list(contenders)
    seconds = [contenders[name]["seconds"]["median"] for name in names]
    quartiles = np.array([contenders[name]["seconds"]["quartiles"] for name in names]).T
    bars = {"xerr": np.abs(quartiles - seconds), "ecolor": "0.25", "capsize": 2}
    memory = [contenders[name]["extra_bytes"] / 1e6 for name in names]
    colors = [COLORS[2] if name.startswith("qsr") else "0.7" for name in names]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.4), layout="constrained")
        time, extra = figure.subplots(1, 2, sharey=True)
        time.barh(names, seconds, color=colors, **bars)
        time.invert_yaxis()
        time.set_xlabel("time of one average (s)")
        time.set_title("medians with quartiles", fontsize=8, loc="right")
        extra.barh(names, memory, color=colors)
        for place, size in enumerate(memory):
            extra.annotate(
                f"{size:.0f}", (size, place), (4, 0), textcoords="offset points", va="center"
            )
        extra.margins(x=0.12)
        extra.set_xlabel("extra memory of one average (MB)")
        for axes in (time, extra):
            axes.grid(axis="y", visible=False)
        return figure


def scale_figure(record: Record) -> Figure:
    """Time spent averaging per 1,000 steps, in units of one step, against the number of workers: a
    colour for each link, QSR solid and blocking data parallel training dotted."""
    rows = pd.DataFrame(record["modelled"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        panels = figure.subplots(1, rows["network"].nunique(), sharey=True)
        for axes, (network, part) in zip(panels, rows.groupby("network", sort=False), strict=True):
            for color, (link, of) in zip(COLORS, part.groupby("link", sort=False), strict=False):
                workers = of["workers"]
                axes.plot(workers, of["steps_lost_per_1000"], ".-", color=color)
                axes.plot([], [], "s", color=color, label=f"link: {link}".replace(" us", " µs"))
                blocking = of["steps_lost_per_1000_data_parallel_blocking"]
                axes.plot(workers, blocking, ":", color=color)
            axes.plot([], [], ".-", color="0.4", label="QSR")
            axes.plot([], [], ":", color="0.4", label="data parallel, blocking")
            axes.set_xscale("log", base=2)
            axes.set_xticks([2, 16, 128, 1024, 4096], ["2", "16", "128", "1,024", "4,096"])
            axes.set_yscale("log")
            label_log_decades(axes.yaxis)
            axes.set_title(network, fontsize=9)
            axes.set_xlabel("workers")
        panels[0].set_ylabel("time spent averaging per\n1,000 steps (in steps)")
        legend_once(figure, ncols=3)
        return figure
