"""What is drawn of costs."""

from functools import cache

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from qsr.config.load import CONFIG_DIR, load_config
from qsr.core.cost import Link
from qsr.planner.forecast import Forecast, forecast
from qsr.report.cost_plots import alpha_figure, hours_figure, link_figure
from qsr.report.paper import read_reference

PUBLISHED = read_reference(CONFIG_DIR.parent / "results" / "paper" / "tables.csv")


@cache
def of(experiment: str) -> Forecast:
    return forecast(load_config([f"experiment={experiment}", "speed=paper_2x8"]))


def bars(axes: Axes) -> list[tuple[float, float, bool]]:
    """Start and width in hours, and whether it is hatched, from the top down."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        (round(patch.get_x(), 2), round(patch.get_width(), 2), bool(patch.get_hatch()))
        for patch in patches
    ]


def places(axes: Axes) -> list[list[float]]:
    """Of the published hours, and which method they belong to."""
    return [np.ravel(np.asarray(line.get_xydata())).tolist() for line in axes.lines]


def heights(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def test_hours_are_stacked_and_stand_beside_published_ones() -> None:
    runs = {"ViT": of("vit_b16_b4096/quadratic_h4"), "ResNet": of("resnet152_b4096/quadratic_h4")}
    figure = hours_figure(runs, PUBLISHED)
    vit, resnet = figure.axes
    assert [label.get_text() for label in vit.get_yticklabels()] == [
        "data parallel, blocking",
        "data parallel, overlapped",
        "constant $H$ = 4",
        "QSR",
    ]
    # computing and communication of each, as docs/planning.md has them
    assert bars(vit) == [
        (0, 19.45, False), (19.45, 7.25, False),
        (0, 19.45, False), (19.45, 0.77, False),
        (0, 19.45, False), (19.45, 1.81, False),
        (0, 19.45, False), (19.45, 0.75, False),
    ]  # fmt: skip
    assert [text.get_text() for text in vit.texts] == ["26.7 fitted", "20.2", "21.3", "20.2 fitted"]
    # the abstract's hours, of the first method and of the last
    assert places(vit) == [[26.7, 0], [20.2, 3]]
    assert [line.get_markerfacecolor() for line in vit.lines] == ["black", "black"]

    # ResNet's computing is unverified, and with it the hours
    assert [hatched for *_, hatched in bars(resnet)] == [1] * 8
    assert [text.get_text() for text in resnet.texts] == ["20.8?", "19.3?", "18.2?", "18.1?"]
    assert places(resnet) == [[20.7, 0]]
    assert resnet.lines[0].get_markerfacecolor() == "white"


def test_hours_over_the_link_meet_those_of_the_profile() -> None:
    run = of("vit_b16_b4096/quadratic_h4")
    (axes,) = link_figure({"ViT": run}).axes
    assert run.model is not None
    assert isinstance(run.model.allreduce, Link)
    *methods, profile = axes.lines
    here = run.model.allreduce.bytes_per_second * 8 / 1e9
    assert np.asarray(profile.get_xdata()).tolist() == pytest.approx([here, here])
    expected = {"data parallel, blocking": 26.7, "data parallel, overlapped": 20.22,
                "constant $H$ = 4": 21.26, "QSR": 20.2}  # fmt: skip
    assert [str(line.get_label()) for line in methods] == list(expected)
    for line, hours in zip(methods, expected.values(), strict=True):
        links, drawn = (np.asarray(values, dtype=float) for values in line.get_data())
        assert (links[0], links[-1]) == pytest.approx((1, 100))
        assert np.interp(here, links, drawn) == pytest.approx(hours, abs=0.03)
    # nothing but computing and 18.59 times the communication at 1 Gbit/s
    assert heights(methods[0])[0] == pytest.approx(19.45 + 7.25 * here, rel=1e-3)


def test_other_alphas_as_the_planner_has_them() -> None:
    figure = alpha_figure(of("vit_b16_b4096/quadratic_h4"), [0.0175, 0.03])
    volume, hours, longest = figure.axes
    # the rows of scripts/plan.py sync.alpha=0.0175,0.03: 9,711 and 3,000 rounds in 93,600 steps
    assert heights(volume.lines[0]) == pytest.approx([9711 / 936, 3000 / 936])
    assert heights(hours.lines[0]) == pytest.approx([20.2, 19.68], abs=0.01)
    assert heights(longest.lines[0]) == pytest.approx([26.1, 31.5], abs=0.05)
    assert heights(hours.lines[1]) == pytest.approx([20.22, 20.22], abs=0.01)  # overlapped
    assert np.asarray(volume.lines[1].get_xdata()).tolist() == [0.0175, 0.0175]
