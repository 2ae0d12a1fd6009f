"""Rounds: the published volumes, tables by hand, and what holds for every schedule and rule."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsr import (
    ConstantRule,
    ConstantSchedule,
    CosineSchedule,
    EveryStepRule,
    LinearSchedule,
    Plan,
    PostLocalRule,
    PowerOfTwoSchedule,
    PowerRule,
    QuadraticRule,
    StepSchedule,
    SwapRule,
)
from qsr.core.rules import Rule
from qsr.core.schedules import Schedule

RESNET = CosineSchedule(peak_lr=0.8, final_lr=1e-6, warmup_steps=1_560, total_steps=62_400)
VIT = CosineSchedule(peak_lr=0.008, final_lr=1e-6, warmup_steps=10_000, total_steps=93_600)
VIT_LINEAR = LinearSchedule(peak_lr=0.008, final_lr=1e-6, warmup_steps=10_000, total_steps=93_600)
RESNET_64 = CosineSchedule(peak_lr=1.6, final_lr=1e-6, warmup_steps=390, total_steps=15_600)
VIT_64 = CosineSchedule(peak_lr=0.016, final_lr=1e-6, warmup_steps=2_500, total_steps=23_400)


@pytest.mark.parametrize(
    ("schedule", "h_base", "alpha", "percent"),
    [
        (RESNET, 2, 0.2, 39.7),
        (RESNET, 4, 0.25, 20.1),
        (VIT, 4, 0.0175, 10.4),
        (VIT, 8, 0.0175, 6.9),
        (VIT_LINEAR, 4, 0.0175, 9.3),
        (RESNET_64, 2, 0.2, 42.8),
        (RESNET_64, 4, 0.2, 21.9),
        (VIT_64, 4, 0.0175, 16.1),
    ],
)
def test_published_volumes(schedule: Schedule, h_base: int, alpha: float, percent: float) -> None:
    plan = Plan(schedule=schedule, rule=QuadraticRule(h_base=h_base, alpha=alpha))
    assert round(100 * plan.volume, 1) == percent


def test_the_vit_run() -> None:
    plan = Plan(schedule=VIT, rule=QuadraticRule(h_base=4, alpha=0.0175))
    assert plan.num_rounds == 9711
    assert round(plan.volume, 5) == 0.10375
    assert plan.total_steps == 93_600
    last = plan.longest_round
    assert (last.index, last.start, last.length, last.end) == (9710, 85_458, 8_142, 93_600)


def test_by_hand() -> None:
    # rates 1, .9, .8 ... .1; alpha 1: H = 1 1 1 2 2 4 6 11 25 100 where the round starts
    plan = Plan(LinearSchedule(1.0, 0.0, 0, 10), QuadraticRule(h_base=1, alpha=1.0))
    rounds = [(r.index, r.start, r.length, round(r.lr, 3)) for r in plan.rounds()]
    assert rounds == [
        (0, 0, 1, 1.0),
        (1, 1, 1, 0.9),
        (2, 2, 1, 0.8),
        (3, 3, 2, 0.7),
        (4, 5, 4, 0.5),
        (5, 9, 1, 0.1),  # asks for 100, cut to the end
    ]


def test_warmup_holds_the_h_of_the_first_step_after_it() -> None:
    # peak 1: H = 4 there; a warm-up rate of 0.1 alone would ask for 400
    plan = Plan(CosineSchedule(1.0, 0.0, 10, 100), QuadraticRule(h_base=2, alpha=2.0))
    lengths = [(r.start, r.length) for r in plan.rounds()]
    assert lengths[:4] == [(0, 4), (4, 4), (8, 4), (12, 4)]  # the third crosses the border
    assert plan.round_at(0).lr == 0.0  # the rate in use, not the one that decided


def test_last_round_is_cut_for_a_constant_h_too() -> None:
    plan = Plan(ConstantSchedule(0.1, 93_600), ConstantRule(7))
    assert [r.length for r in plan.rounds(from_step=93_590)] == [7, 3]


def test_post_local_and_swap() -> None:
    schedule = ConstantSchedule(0.1, 10)
    post = Plan(schedule, PostLocalRule(4, 3))
    assert [(r.start, r.length, r.averages) for r in post.rounds(2)] == [
        (2, 1, "gradients"),
        (3, 1, "gradients"),
        (4, 3, "parameters"),
        (7, 3, "parameters"),
    ]
    swap = Plan(schedule, SwapRule(4))
    assert [r.length for r in swap.rounds()] == [1, 1, 1, 1, 6]
    assert (post.gradient_rounds, swap.gradient_rounds) == (4, 4)


def test_a_rate_of_zero_runs_to_the_end() -> None:
    plan = Plan(LinearSchedule(1.0, 0.0, 0, 4), QuadraticRule(1, 0.5))
    assert [r.length for r in plan.rounds()] == [1, 1, 1, 1]
    stopped = Plan(StepSchedule(1.0, (2,), 0.001, 9), PowerRule(1, 1.0, 2))
    assert [r.length for r in stopped.rounds()] == [1, 1, 7]


def schedules() -> st.SearchStrategy[Schedule]:
    @st.composite
    def build(draw: st.DrawFn) -> Schedule:
        total = draw(st.integers(1, 400))
        warmup = draw(st.integers(0, total - 1))
        peak = draw(st.floats(1e-3, 2.0))
        final = draw(st.sampled_from([0.0, 1e-6, 1e-3]))
        stop = draw(st.none() | st.integers(warmup, total))
        cosine = CosineSchedule(peak, final, warmup, total, stop)
        milestones = tuple(sorted(draw(st.sets(st.integers(warmup, total), max_size=3)) - {total}))
        kinds: list[Schedule] = [
            cosine,
            PowerOfTwoSchedule(cosine),
            LinearSchedule(peak, final, warmup, total),
            ConstantSchedule(peak, total, warmup),
            StepSchedule(peak, milestones, 0.1, total, warmup),
        ]
        return draw(st.sampled_from(kinds))

    return build()


RULES = st.one_of(
    st.just(EveryStepRule()),
    st.builds(ConstantRule, st.integers(1, 50)),
    st.builds(QuadraticRule, st.integers(1, 9), st.floats(1e-3, 2.0)),
    st.builds(PowerRule, st.integers(1, 9), st.floats(1e-3, 2.0), st.sampled_from([1, 3, 1.5])),
    st.builds(PostLocalRule, st.integers(0, 500), st.integers(1, 50)),
    st.builds(SwapRule, st.integers(0, 500)),
)


@given(schedule=schedules(), rule=RULES)
def test_rounds_tile_the_run(schedule: Schedule, rule: Rule) -> None:
    plan = Plan(schedule, rule)
    rounds = list(plan.rounds())
    assert [r.index for r in rounds] == list(range(plan.num_rounds))
    assert rounds[0].start == 0
    assert rounds[-1].end == plan.total_steps
    assert all(a.end == b.start and a.length >= 1 for a, b in itertools.pairwise(rounds))
    assert all(r.lr == schedule(r.start) for r in rounds)
    assert plan.volume == len(rounds) / schedule.total_steps


@given(schedule=schedules(), rule=RULES)
def test_h_never_falls_while_the_rate_falls(schedule: Schedule, rule: Rule) -> None:
    after = [r for r in Plan(schedule, rule).rounds() if r.start >= schedule.warmup_steps]
    uncut = after[:-1]  # the last round is cut
    for earlier, later in itertools.pairwise(uncut):
        if later.lr <= earlier.lr:
            assert later.length >= earlier.length


@given(schedule=schedules(), rule=RULES, data=st.data())
def test_rounds_from_a_step_are_a_suffix(
    schedule: Schedule, rule: Rule, data: st.DataObject
) -> None:
    plan = Plan(schedule, rule)
    step = data.draw(st.integers(0, plan.total_steps))
    assert list(plan.rounds(from_step=step)) == [r for r in plan.rounds() if r.end > step]
    if step < plan.total_steps:
        assert next(plan.rounds(step)) == plan.round_at(step)


@settings(max_examples=25)
@given(schedule=schedules(), h_base=st.integers(1, 9), alpha=st.floats(1e-3, 2.0))
def test_agrees_with_the_released_loop(schedule: Schedule, h_base: int, alpha: float) -> None:
    """Step by step, as the authors' training loop does it: a counter, and H set after each
    average from the rate of the next step. In the warm-up H is a constant given by hand."""
    total, warmup = schedule.total_steps, schedule.warmup_steps
    at_peak = schedule(warmup)
    h = max(h_base, int((alpha / at_peak) ** 2)) if at_peak else total
    expected, since, h = [], 0, min(h, total)
    for step in range(total):
        since += 1
        if since == h:
            expected.append(step + 1)
            since = 0
            lr, remaining = schedule(step + 1), total - step - 1
            if step + 1 < warmup:
                lr = at_peak
            wanted = max(h_base, int((alpha / lr) ** 2)) if lr else remaining
            h = max(min(wanted, remaining), 1)
    plan = Plan(schedule, QuadraticRule(h_base, alpha))
    assert [r.end for r in plan.rounds()] == expected


def test_refuses_steps_outside_the_run() -> None:
    plan = Plan(ConstantSchedule(0.1, 10), ConstantRule(3))
    with pytest.raises(ValueError, match="from_step 11"):
        plan.rounds(11)
    with pytest.raises(ValueError, match="step 10"):
        plan.round_at(10)


def test_importing_the_public_names_imports_no_third_party_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import qsr\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['qsr']"
