"""Colours, axes, and pictures as files."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qsr.core.rules import (
    ConstantRule,
    EveryStepRule,
    PostLocalRule,
    PowerRule,
    QuadraticRule,
    Rule,
    SwapRule,
)
from qsr.report.style import (
    COLORS,
    label_log_decades,
    label_log_ticks,
    legend_once,
    nested_widths,
    png,
    rule_colors,
)

QSR = QuadraticRule(4, 0.1)


def test_a_kind_of_rule_has_its_colour_beside_whatever_rules() -> None:
    rules: list[Rule] = [
        EveryStepRule(),
        ConstantRule(4),
        QSR,
        PowerRule(4, 0.1, 1),
        PowerRule(4, 0.1, 3),
        PostLocalRule(10, 4),
    ]
    assert rule_colors(rules) == list(COLORS)
    assert rule_colors(rules[::-1]) == list(COLORS)[::-1]
    assert rule_colors([QSR]) == [COLORS[2]]


def test_where_rules_would_share_a_colour_they_take_turns() -> None:
    assert rule_colors([QSR, QuadraticRule(4, 0.2)]) == list(COLORS[:2])
    assert rule_colors([PostLocalRule(10, 4), SwapRule(10)]) == list(COLORS[:2])
    assert rule_colors([QSR] * 6) == list(COLORS)
    assert len(set(rule_colors([QSR] * 20))) == 20  # where the palette is too small


def test_lines_that_coincide_are_all_seen() -> None:
    assert nested_widths(3) == pytest.approx([2.8, 2.0, 1.2])
    assert nested_widths(1) == [2.8]


def shown(axes_labels: list[str], limits: tuple[float, float], ticks: list[float]) -> list[str]:
    return [
        text
        for text, tick in zip(axes_labels, ticks, strict=True)
        if limits[0] <= tick <= limits[1]
    ]


def test_logarithmic_axes_have_plain_numbers() -> None:
    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(0.004, 0.06)
    label_log_decades(axes.xaxis)
    ticks = axes.xaxis.get_majorticklocs().tolist()
    texts = axes.xaxis.get_major_formatter().format_ticks(ticks)
    assert shown(texts, (0.004, 0.06), ticks) == ["0.005", "0.01", "0.02", "0.05"]
    axes.set_yscale("log")
    label_log_ticks(axes.yaxis, (5, 0.5, 2000))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["5", "0.5", "2,000"]
    assert axes.yaxis.get_minorticklocs().tolist() == []


@pytest.mark.parametrize(("by_label", "order"), [(False, ["b", "c", "a"]), (True, ["a", "b", "c"])])
def test_a_legend_names_each_label_once(by_label: bool, order: list[str]) -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, labels in ((left, "bc"), (right, "cba")):
        for label in labels:
            axes.plot([1, 2], label=label)
    legend_once(figure, ncols=3, by_label=by_label)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == order


@pytest.mark.parametrize("count", [1, 4, 9, 40])
@pytest.mark.parametrize("label", ["QSR", "QSR, H_base = 4, alpha = 0.4375, epochs = 9, seed 1"])
def test_a_legend_of_any_length_fits(count: int, label: str) -> None:
    """In the figure, and without squeezing its axes."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for number in range(count):
        axes.plot([1, 2], label=f"{label} {number}")
    legend_once(figure, ncols=4)
    png(figure)  # lays it out
    (legend,) = figure.legends
    extent, whole = legend.get_window_extent(), figure.bbox
    assert extent.x0 >= whole.x0
    assert extent.x1 <= whole.x1
    assert extent.y0 >= whole.y0
    assert axes.get_window_extent().y0 > extent.y1
    assert axes.get_window_extent().height / figure.dpi > 2.0


def test_a_notebooks_picture_is_small_and_nothing_but_the_picture() -> None:
    def draw() -> Figure:
        figure = Figure(figsize=(3, 2))
        figure.subplots().plot(np.arange(5), color=COLORS[0])
        return figure

    data = png(draw())
    assert png(draw()) == data
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (360, 240)
    assert picture.info == {}
    colors = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert colors is not None
    assert len(colors) > 64  # none was replaced by one that is like it
    assert (0, 0x72, 0xB2) in {color for _, color in colors}
