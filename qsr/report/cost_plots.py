"""Costs of runs -> figures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qsr.core.cost import Link, RunCost
from qsr.core.plan import Plan
from qsr.core.rules import QuadraticRule
from qsr.planner import what_if
from qsr.planner.forecast import Forecast, Method
from qsr.report.cost_tables import published_hours
from qsr.report.paper import ReferenceRow
from qsr.report.style import (
    COLORS,
    COMMUNICATION,
    COMPUTING,
    PART_STYLES,
    STYLE,
    label_log_decades,
    label_log_ticks,
    legend_once,
    rule_colors,
)
from qsr.report.symbols import SYMBOLS, typeset

FloatArray = NDArray[np.float64]
_LINKS_GBIT_PER_SECOND = (1, 2, 5, 10, 20, 50, 100)


def hours_figure(forecasts: Mapping[str, Forecast], published: Iterable[ReferenceRow]) -> Figure:
    """Hours of each way to train, with a panel for each forecast; diamonds are published hours.

    All forecasts need times. Bars that rest on an unverified value are hatched, unverified hours
    hollow.
    """
    rows = tuple(published)
    with mpl.rc_context(STYLE | {"hatch.linewidth": 2, "hatch.color": "white"}):
        columns = min(2, len(forecasts))
        lines = math.ceil(len(forecasts) / columns)
        figure = Figure(figsize=(4.3 * columns, 1.9 * lines + 0.5), layout="constrained")
        for place, (title, forecast) in enumerate(forecasts.items(), start=1):
            axes = figure.add_subplot(lines, columns, place)
            axes.set_title(title, fontsize=9)
            methods = forecast.by_volume()
            for height, method in enumerate(methods):
                _draw_hours(axes, height, forecast, method)
                hours = published_hours(forecast, method, rows)
                if hours is not None:
                    axes.plot(
                        hours.value,
                        height,
                        "D",
                        color="black",
                        markersize=5,
                        markerfacecolor="black" if hours.verified else "white",
                        label="published" + ("" if hours.verified else ", unverified"),
                    )
            axes.set_yticks(range(len(methods)), [typeset(_short(method)) for method in methods])
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.25)
            axes.set_xlim(0)
            if place % columns != 1 % columns:
                axes.tick_params(labelleft=False)
            axes.set_xlabel("time (hours)")
        legend_once(figure, ncols=3, by_label=True)
        return figure


def _short(method: Method) -> str:
    """The method's label without the rule's settings."""
    return method.label.partition(",")[0] if method.overlapped is None else method.label


def _draw_hours(axes: Axes, height: float, forecast: Forecast, method: Method) -> None:
    assert method.cost is not None
    unverified, end = forecast.unverified(method), 0.0
    parts = {
        COMPUTING: method.cost.compute_seconds,
        COMMUNICATION: method.cost.communication_seconds,
    }
    for name, seconds in parts.items():
        mark: dict[str, Any] = {"hatch": "////"} if unverified else {}
        label = name + (", rests on unverified hours" if mark else "")
        axes.barh(height, seconds / 3600, 0.6, left=end, label=label, **PART_STYLES[name], **mark)
        end += seconds / 3600
    text = f"{end:.1f}" + ("?" if unverified else "") + (" fitted" if method.fitted_hours else "")
    axes.annotate(text, (end, height), (8, 0), textcoords="offset points", va="center", fontsize=8)


def link_figure(forecasts: Mapping[str, Forecast]) -> Figure:
    """Hours of each way to train against the bandwidth of a machine's link, with a panel for each
    forecast. Each forecast's all-reduce must be a `Link`."""
    links = np.geomspace(_LINKS_GBIT_PER_SECOND[0], _LINKS_GBIT_PER_SECOND[-1], 200)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(forecasts), 3.2), layout="constrained")
        panels = figure.subplots(1, len(forecasts), squeeze=False, sharey=True)[0]
        for axes, (title, forecast) in zip(panels, forecasts.items(), strict=True):
            axes.set_title(title, fontsize=9)
            for method in forecast.by_volume():
                axes.plot(
                    links,
                    [_hours_with_link(forecast, method, float(link)) for link in links],
                    "--" if method.overlapped else "-",
                    color=rule_colors([method.plan.rule])[0],
                    label=typeset(_short(method)),
                )
            own = forecast.config.speed
            assert own is not None
            assert own.link_gbit_per_second is not None
            place = (own.link_gbit_per_second, 0.97)
            axes.axvline(place[0], color="0.5", linestyle=":", zorder=0)
            axes.annotate(
                f"the profile's:\n{place[0]:.1f} Gbit/s",
                place,
                (4, 0),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                va="top",
                color="0.35",
                fontsize=8,
            )
            axes.set_xscale("log")
            axes.set_yscale("log")
            label_log_ticks(axes.xaxis, _LINKS_GBIT_PER_SECOND)
            label_log_ticks(axes.yaxis, (5, 10, 20, 50, 100))
            axes.set_xlabel("effective link of a machine (Gbit/s)")
        panels[0].set_ylabel("time (hours)")
        legend_once(figure, ncols=4)
        return figure


def _hours_with_link(forecast: Forecast, method: Method, gbit_per_second: float) -> float:
    assert forecast.model is not None
    link = forecast.model.allreduce
    assert isinstance(link, Link)
    model = replace(
        forecast.model, allreduce=replace(link, bytes_per_second=gbit_per_second * 1e9 / 8)
    )
    return _hours(model.run(method.plan, overlapped=bool(method.overlapped)))


def alpha_figure(forecast: Forecast, alphas: Sequence[float]) -> Figure:
    """Volume, hours and longest round of a QSR run for several alphas; a line marks its own."""
    rule, model = forecast.plan.rule, forecast.model
    assert isinstance(rule, QuadraticRule)
    assert model is not None
    plans = [Plan(forecast.plan.schedule, replace(rule, alpha=alpha)) for alpha in alphas]
    overlapped = forecast.data_parallel(overlapped=True)
    assert overlapped.cost is not None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.9), layout="constrained")
        volume, hours, longest = figure.subplots(1, 3)
        color = rule_colors([rule])[0]
        volume.plot(alphas, [100 * plan.volume for plan in plans], ".-", color=color)
        volume.set_ylabel("volume (% of data parallel)")
        volume.set_ylim(0)
        totals = [_hours(model.run(plan, overlapped=False)) for plan in plans]
        hours.plot(alphas, totals, ".-", color=color, label="QSR")
        hours.axhline(
            _hours(overlapped.cost), color=COLORS[0], linestyle="--", label=overlapped.label
        )
        hours.set_ylabel("time (hours)")
        # no line: the longest round depends on how the last rounds happen to fit into the run
        epochs = [plan.longest_round.length / forecast.steps_per_epoch for plan in plans]
        longest.plot(alphas, epochs, ".", color=color)
        longest.set_ylabel("longest round (epochs)")
        longest.set_ylim(0)
        for axes in (volume, hours, longest):
            axes.axvline(rule.alpha, color="0.5", linestyle=":", zorder=0)
            axes.set_xscale("log")
            label_log_decades(axes.xaxis)
            axes.set_xlabel(SYMBOLS["alpha"])
        hours.plot(
            [], [], ":", color="0.5", label=typeset(f"the run's own: alpha = {rule.alpha:g}")
        )
        legend_once(figure, ncols=3)
        return figure


def _hours(cost: RunCost) -> float:
    return cost.total_seconds / 3600


def what_if_figure() -> Figure:
    """Share of overlapped data parallel training's time that QSR saves, against the link of a
    machine, with a panel for each GPU: for the fewest workers, and (lighter) for the most."""
    links = np.geomspace(what_if.LINKS_GBIT_PER_SECOND[0], what_if.LINKS_GBIT_PER_SECOND[-1], 400)
    few, many = what_if.WORKERS[0], what_if.WORKERS[-1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.8), layout="constrained")
        panels = figure.subplots(1, len(what_if.GPUS), sharey=True)
        for axes, gpu in zip(panels, what_if.GPUS, strict=True):
            for color, network in zip(COLORS, what_if.networks(), strict=False):
                if network.name in _LIKE_ANOTHER:
                    continue
                saved, saved_by_many = (
                    np.array([_saved(network, gpu, workers, float(link)) for link in links])
                    for workers in (few, many)
                )
                axes.plot(links, saved, color=color)
                axes.fill_between(links, saved, saved_by_many, color=color, alpha=0.3, linewidth=0)
                _label_line(axes, network, links, saved, color)
            axes.axhline(0, color="0.25", linewidth=0.8)
            axes.set_title(gpu, fontsize=9)
            axes.set_xscale("log")
            axes.set_ylim(-8, 100)
            label_log_ticks(axes.xaxis, (1, 3, 10, 30, 100, 300))
            axes.set_xlabel("effective link of a machine (Gbit/s)")
        panels[0].set_ylabel("time saved by QSR (%)\nof overlapped data parallel training")
        axes = panels[0]
        axes.plot([], [], color="0.4", label=f"{few} workers")
        axes.fill_between([], [], color="0.4", alpha=0.3, label=f"up to {many:,} workers")
        legend_once(figure, ncols=2)
        return figure


_LIKE_ANOTHER = ("ViT-L/16",)
"""Networks whose line another one's covers, to whose label they are added."""
_LABELS: dict[str, tuple[str, float, tuple[int, str]]] = {
    "ViT-B/16": ("ViT-B/16 and ViT-L/16", 50.0, (6, "left")),
    "ViT-H/14": ("ViT-H/14", 4.0, (-6, "right")),
    "ResNet-152": ("ResNet-152\n(speed unverified)", 24.0, (-12, "right")),
}
"""Of each network: its label, at how many percent it stands, and on which side of its line."""


def _saved(network: what_if.Network, gpu: str, workers: int, link: float) -> float:
    return 100 * what_if.case(network, gpu, workers, link).saved_of_overlapped


def _label_line(
    axes: Axes, network: what_if.Network, links: FloatArray, saved: FloatArray, color: str
) -> None:
    text, height, (offset, side) = _LABELS[network.name]
    place = (float(links[np.argmax(saved <= height)]), height)
    axes.annotate(
        text, place, (offset, 0), textcoords="offset points", ha=side, va="center", color=color,
        fontsize=8,
    )  # fmt: skip
