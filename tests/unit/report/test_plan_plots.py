"""What is drawn of plans."""

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule, PowerRule, QuadraticRule, Rule
from qsr.core.schedules import LinearSchedule
from qsr.report.plan_plots import borders_figure, length_figure, plan_figure
from qsr.report.style import COLORS

# up from 0 to 1 in 10 steps, down to 0 in 90
SCHEDULE = LinearSchedule(peak_lr=1.0, final_lr=0.0, warmup_steps=10, total_steps=100)
PLAN = Plan(SCHEDULE, QuadraticRule(2, 1.0))


def points(line: Line2D) -> dict[float, float]:
    x, y = (np.asarray(data, dtype=float).tolist() for data in line.get_data())
    return dict(zip(x, y, strict=True))


def test_the_plan_is_drawn_round_by_round() -> None:
    figure = plan_figure({"QSR": PLAN, "H = 30": Plan(SCHEDULE, ConstantRule(30))}, 10)
    top, bottom = figure.axes
    rates = points(top.lines[0])
    assert (rates[0.5], rates[1.0], rates[5.5]) == (0.5, 1.0, 0.5)  # epochs of 10 steps
    constant = bottom.patches[1]
    assert isinstance(constant, StepPatch)
    lengths, edges, _ = constant.get_data()
    assert lengths.tolist() == [30, 30, 30, 10]
    assert edges.tolist() == [0, 3, 6, 9, 10]
    assert points(bottom.lines[1]) == {3: 30, 6: 30, 9: 30, 10: 10}  # averages
    (legend,) = figure.legends
    assert legend.get_texts()[1].get_text() == "$H$ = 30: 4 rounds, volume 4.0 %"


def test_powers_of_the_rate_over_the_rate() -> None:
    rules: dict[str, Rule] = {"constant": ConstantRule(4), "QSR": QuadraticRule(4, 0.0175),
             "cubic": PowerRule(4, 0.0125, 3)}  # fmt: skip
    (axes,) = length_figure(rules, peak_lr=0.008).axes
    constant, quadratic, cubic = (points(line) for line in axes.lines)
    assert set(constant.values()) == {4}
    # (0.0175 x 32 / 0.008)^2 = 70^2 and (0.0125 x 32 / 0.008)^3 = 50^3
    assert (quadratic[1.0], quadratic[1 / 32]) == (4, 4900)
    assert (cubic[1.0], cubic[1 / 32]) == (4, 125_000)
    assert [text.get_text() for text in axes.texts] == ["constant", "QSR", "cubic"]
    assert axes.lines[1].get_color() == COLORS[2]


def test_the_borders_show_what_the_rule_would_ask_for() -> None:
    plan = Plan(SCHEDULE, QuadraticRule(2, 1.5))
    left, right = borders_figure(plan, 10).axes
    asked, planned = points(left.lines[0]), left.patches[0]
    # half the rate in step 5, nine tenths in step 9; step 0 has none, and asks for no end
    assert (asked[0.5], asked[0.9], asked[1.0]) == (9, 2, 2)
    assert np.isinf(asked[0.0])
    assert isinstance(planned, StepPatch)
    lengths, edges, _ = planned.get_data()
    assert (lengths[0], edges[1]) == (2, 0.2)
    assert left.get_xlim() == (0, 2)
    assert right.get_xlim() == (8, 10)
    # 13 steps before the end the rate is 13 / 90: (1.5 x 90 / 13)^2 = 107.8
    (text,) = right.texts
    assert text.get_text() == "last round: 13 steps,\nthe rule asks for 107"


@pytest.mark.parametrize("steps", [1000, 1001])
def test_only_so_many_averages_have_marks(steps: int) -> None:
    schedule = LinearSchedule(1.0, 0.0, 0, steps)
    bottom = plan_figure({"H = 1": Plan(schedule, ConstantRule(1))}).axes[1]
    assert len(bottom.lines) == (steps == 1000)
