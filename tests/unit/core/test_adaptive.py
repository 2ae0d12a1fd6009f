"""Rules that follow the loss or a record, against tables that can be checked by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr import AdaptiveRule, CappedRule, ConstantSchedule, CosineSchedule, Plan, ReplayRule, Rule
from qsr.core.adaptive import read_rounds, rounds_text
from qsr.core.open_plan import OpenPlan
from qsr.core.rules import PostLocalRule


@pytest.mark.parametrize(
    ("lr", "loss", "h"),
    [
        (0.4, 2.0, 16),  # as at first
        (0.4, 0.5, 8),  # a quarter of the loss: half of the steps
        (0.4, 0.51, 9),  # rounded up: 8.08
        (0.1, 2.0, 32),  # a quarter of the rate: twice the steps
        (0.1, 0.5, 16),
        (0.4, 0.0, 1),
        (0.4, 8.0, 32),  # a loss that has grown
        (0.0, 2.0, None),  # until the end
    ],
)
def test_adaptive_after_a_first_round_at_rate_04_with_loss_2(
    lr: float, loss: float, h: int | None
) -> None:
    rule: Rule = AdaptiveRule(16)
    assert rule.length(0, 0.4) == 16
    rule = rule.after(0.4).observe(2.0)
    assert rule.after(lr).observe(loss).length(100, lr) == h


def test_an_open_plan_is_cut_as_it_goes() -> None:
    plan = OpenPlan(ConstantSchedule(0.4, 42), AdaptiveRule(16))
    found = []
    for round_, loss in zip(plan.rounds(), (2.0, 0.5, 0.02, 1.0), strict=True):
        found.append((round_.start, round_.length))
        assert plan.round_at(round_.end - 1) == round_
        with pytest.raises(ValueError, match=f"the round of step {round_.end} is not known yet"):
            plan.round_at(round_.end)
        plan.observe(loss)
    # the first loss; a quarter of it, which halves H; a hundredth: 1.6
    assert found == [(0, 16), (16, 16), (32, 8), (40, 2)]


def test_in_the_warmup_the_rate_after_it_decides() -> None:
    plan = OpenPlan(CosineSchedule(0.8, 0.0, 10, 100), AdaptiveRule(4))
    for number, round_ in zip(range(3), plan.rounds(), strict=False):
        assert (round_.index, round_.length) == (number, 4)
        plan.observe(1.0)


def test_a_loaded_plan_goes_on_as_the_first_one() -> None:
    schedule = CosineSchedule(0.4, 0.0, 5, 200)
    first, second = (OpenPlan(schedule, CappedRule(AdaptiveRule(8), 12)) for _ in range(2))
    ends = []
    for round_, loss in zip(first.rounds(), (2.0, 1.7, 1.1, 0.9, 1.2), strict=False):
        ends.append(round_.end)
        first.observe(loss)
    second.load(first.losses)
    middle = ends[-1] + 1  # the round that was going on
    assert next(second.rounds(middle)) == next(first.rounds(middle))
    assert [second.round_at(end - 1) for end in ends] == [first.round_at(end - 1) for end in ends]


def test_gradients_cannot_be_averaged_in_an_open_plan() -> None:
    plan = OpenPlan(ConstantSchedule(0.1, 10), PostLocalRule(5, 2))
    with pytest.raises(ValueError, match="the round at step 0 averages gradients"):
        plan.round_at(0)


def test_a_replay_repeats_the_rounds_and_then_runs_to_the_end() -> None:
    plan = Plan(CosineSchedule(0.4, 0.0, 5, 30), ReplayRule((4, 4, 7)))
    assert [(r.start, r.length) for r in plan.rounds()] == [(0, 4), (4, 4), (8, 7), (15, 15)]


def test_a_hundred_thousand_rounds_are_no_burden() -> None:
    """A look at all lengths in every round would be 10^10."""
    plan = Plan(ConstantSchedule(0.1, 200_000), ReplayRule((2,) * 100_000))
    assert plan.num_rounds == 100_000


@given(lengths=st.lists(st.integers(1, 9), min_size=1))
def test_rounds_as_text_and_back(lengths: list[int]) -> None:
    assert read_rounds(rounds_text(lengths)) == tuple(lengths)


def test_rounds_as_people_write_them() -> None:
    assert rounds_text([4, 4, 4, 8, 3, 3]) == "3x4 8 2x3"
    assert read_rounds("# of a run\n4 4\t4\n8  # one\n\n2x3") == (4, 4, 4, 8, 3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rounds in it"),
        ("# nothing", "no rounds in it"),
        ("4 0", "line 1: '0' is not a round: write H, or COUNTxH for several"),
        ("4\n4.5", "line 2: '4.5' is not a round"),
        ("0x4", "'0x4' is not a round"),
        ("4x", "'4x' is not a round"),
        ("-3", "'-3' is not a round"),
        ("99999999x1", "line 1: more than 10,000,000 rounds"),
    ],
)
def test_what_is_not_rounds(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rounds(text)


def test_refuses_rounds_without_steps() -> None:
    with pytest.raises(ValueError, match="h must be at least 1"):
        AdaptiveRule(0)
    with pytest.raises(ValueError, match="each H must be at least 1"):
        ReplayRule(())
