"""Shared by all figures: colours, fonts, axes, and saving to files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from qsr.core.rules import ConstantRule, EveryStepRule, PowerRule, QuadraticRule, Rule

# Okabe and Ito's palette, which colour-blind readers can distinguish
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "qsr",  # the same figure gives the same file
}
# the parts of a run's time, distinguishable in grey too
COMPUTING, COMMUNICATION, WAITING = "computing", "communication", "waiting for data"
COMPUTING_AND_COMMUNICATION = "computing and communication, overlapped"
PART_STYLES: dict[str, dict[str, Any]] = {
    COMPUTING: {"color": "0.8"},
    COMPUTING_AND_COMMUNICATION: {"facecolor": "0.8", "edgecolor": COLORS[3], "hatch": "////"},
    COMMUNICATION: {"color": COLORS[3]},
    WAITING: {"color": COLORS[1]},
    "evaluations": {"color": COLORS[5]},
    "checkpoints": {"color": "0.3"},
}
NOTEBOOK_DPI = 120
"""Dots per inch in notebooks: their files stay small, and text sharp."""
_TWO_LINES = 0.5
"""Height of a legend of two lines, in inches."""


def rule_colors(rules: Sequence[Rule]) -> list[str]:
    """A colour for each rule. Every kind of rule has the same colour in all figures, unless two
    rules would share one; then colours are assigned in order, from a wider range where these are
    too few."""
    own = [_rule_color(rule) for rule in rules]
    if len(set(own)) == len(own):
        return own
    if len(own) <= len(COLORS):
        return list(COLORS[: len(own)])
    return [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.92, len(own)))]


def _rule_color(rule: Rule) -> str:
    match rule:
        case EveryStepRule():
            return COLORS[0]
        case ConstantRule():
            return COLORS[1]
        case QuadraticRule():
            return COLORS[2]
        case PowerRule(exponent=exponent) if exponent < 2:
            return COLORS[3]
        case PowerRule():
            return COLORS[4]
    return COLORS[5]  # data parallel first, then local


def nested_widths(count: int) -> list[float]:
    """Line widths in points, decreasing from the first line to the last, so that lines that
    coincide all stay visible."""
    return [float(width) for width in np.linspace(2.8, 1.2, count)]


def label_log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers at these ticks only."""
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def label_log_decades(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def legend_once(figure: Figure, *, ncols: int, by_label: bool = False) -> None:
    """A legend below the figure with each label of its axes once, in drawing order, or sorted with
    `by_label`, so that a label comes before its variants."""
    found = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
    handles = {label: handle for pairs in found for handle, label in pairs}
    labels = sorted(handles) if by_label else list(handles)
    fit_legend(figure, [handles[label] for label in labels], labels, ncols)


def fit_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], ncols: int
) -> None:
    """A legend below the figure, in as many of `ncols` columns as its width allows; the figure
    grows by what the legend is higher than two lines."""
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    for columns in range(min(ncols, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        extent = legend.get_window_extent(renderer)
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    else:
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(0.0, extent.height / figure.dpi - _TWO_LINES))


def save(figure: Figure, path: Path) -> None:
    """Write PATH.png and PATH.svg."""
    with mpl.rc_context(STYLE):
        figure.savefig(path.with_name(path.name + ".png"), dpi=160)
        figure.savefig(path.with_name(path.name + ".svg"), dpi=160, metadata={"Date": None})


def png(figure: Figure) -> bytes:
    """A PNG for a notebook, at NOTEBOOK_DPI, because the notebook's file contains it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(drawn, format="png", dpi=NOTEBOOK_DPI)
    # all colours are kept: with few, dots of one colour differ
    Image.open(drawn).convert("RGB").save(small, format="png", optimize=True)
    return small.getvalue()
