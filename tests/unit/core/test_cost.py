"""Seconds and bytes by hand, and a fit against an independent solver."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan, PostLocalRule
from qsr.core.cost import (
    AverageOfParts,
    CostModel,
    Link,
    MeasuredAllReduce,
    RunCost,
    averaged_bytes,
    exposed_seconds,
    fit_link,
    ring_bytes,
)


@pytest.mark.parametrize(
    ("ranks", "latency", "seconds"),
    [
        # 1 GB at 1 GB/s: 2 (ranks - 1) / ranks s, and 2 ceil(log2 ranks) latencies
        (1, 0.5, 0.0),
        (2, 0.0, 1.0),
        (2, 0.5, 1.0 + 2 * 0.5),
        (4, 0.0, 1.5),
        (4, 0.001, 1.5 + 4 * 0.001),
        (5, 0.001, 1.6 + 6 * 0.001),
        (16, 0.001, 1.875 + 8 * 0.001),
    ],
)
def test_an_allreduce_by_hand(ranks: int, latency: float, seconds: float) -> None:
    # however many machines: the ranks of one share its link, which a ring crosses once
    for machines in (1, 2):
        assert Link(ranks, machines, 1e9, latency).seconds(1e9) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("num_bytes", "seconds"),
    [(1, 2.0), (100, 2.0), (150, 2.5), (200, 3.0), (500, 6.0), (800, 9.0), (1600, 18.0)],
)
def test_measured_allreduces_are_joined_by_straight_lines(num_bytes: int, seconds: float) -> None:
    measured = MeasuredAllReduce(2, 1, (100, 200, 800), (2.0, 3.0, 9.0))
    assert measured.seconds(num_bytes) == pytest.approx(seconds)
    assert MeasuredAllReduce(1, 1, (100,), (2.0,)).seconds(num_bytes) == 0.0


@pytest.mark.parametrize(
    ("sizes", "seconds"), [((100, 200), (1.0,)), ((200, 100), (1.0, 2.0)), ((9, 9), (1.0, 2.0))]
)
def test_measured_sizes_must_rise(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising sizes"):
        MeasuredAllReduce(2, 1, sizes, seconds)


SIZES = (4_096, 65_536, 1_048_576, 16_777_216)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_fit_finds_the_link_that_made_the_times(ranks: int) -> None:
    link = Link(ranks, 2, 3e9, 40e-6)
    found, residual = fit_link(ranks, 2, SIZES, [link.seconds(size) for size in SIZES])
    assert found.bytes_per_second == pytest.approx(3e9)
    assert found.latency_seconds == pytest.approx(40e-6)
    assert residual == pytest.approx(0.0, abs=1e-9)


@given(errors=st.lists(st.floats(0.8, 1.25), min_size=4, max_size=4))
def test_the_fit_is_least_squares_on_the_relative_error(errors: list[float]) -> None:
    link = Link(4, 1, 1e9, 1e-4)
    seconds = [link.seconds(size) * e for size, e in zip(SIZES, errors, strict=True)]
    found, residual = fit_link(4, 1, SIZES, seconds)
    # numpy's solver: latencies * latency + ring bytes * (1 / bandwidth) = seconds, rows weighted
    matrix = np.array([[4.0, 1.5 * size] for size in SIZES]) / np.array(seconds)[:, None]
    solution, squares, _, _ = np.linalg.lstsq(matrix, np.ones(4), rcond=None)
    assert found.latency_seconds == pytest.approx(solution[0], rel=1e-6)
    assert 1 / found.bytes_per_second == pytest.approx(solution[1], rel=1e-6)
    assert residual == pytest.approx(math.sqrt(squares[0] / 4), rel=1e-4, abs=1e-9)


def test_a_latency_is_not_negative() -> None:
    # 1 s for the first GB, 1.2 s for each one after it: a line through them starts below zero
    found, _ = fit_link(2, 1, (10**9, 2 * 10**9, 3 * 10**9), (1.0, 2.2, 3.4))
    assert found.latency_seconds == 0.0
    # then 1 / bandwidth = sum(x) / sum(x^2), with x = GB / s of each row
    rows = (1 / 1.0, 2 / 2.2, 3 / 3.4)
    expected = 1e9 * sum(x * x for x in rows) / sum(rows)
    assert found.bytes_per_second == pytest.approx(expected)


def test_times_that_fall_with_the_size_are_refused() -> None:
    with pytest.raises(ValueError, match="do not take longer for more bytes"):
        fit_link(2, 1, SIZES, (4.0, 3.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("allreduce", "window", "last_bucket", "exposed"),
    [
        (1.0, 0.0, 0.1, 1.0),  # nothing to hide behind
        (1.0, 0.4, 0.1, 0.6),
        (1.0, 0.95, 0.1, 0.1),  # all but the last bucket
        (1.0, 5.0, 0.1, 0.1),
        (0.05, 5.0, 0.1, 0.05),  # never more than all of it
        (0.0, 5.0, 0.0, 0.0),
    ],
)
def test_what_ddp_cannot_hide(
    allreduce: float, window: float, last_bucket: float, exposed: float
) -> None:
    assert exposed_seconds(allreduce, window, last_bucket) == pytest.approx(exposed)


# 100 MiB at 2 ranks and 100 MiB/s: 1 s, a bucket of 25 MiB 0.25 s
MODEL = CostModel(Link(2, 2, 100 * 2**20, 0.0), 1.2, 1, 100 * 2**20)


@pytest.mark.parametrize(
    ("micro_batches", "exposed"),
    [
        (1, 0.25),  # the backward pass takes 0.8 s: only the last bucket is left over
        (2, 0.6),  # 0.4 s of it hide: gradients are summed up before
        (4, 0.8),
        (8, 0.9),
    ],
)
def test_accumulated_gradients_overlap_with_the_last_micro_batch(
    micro_batches: int, exposed: float
) -> None:
    model = CostModel(MODEL.allreduce, 1.2, micro_batches, MODEL.parameter_bytes)
    assert model.gradient_seconds == pytest.approx(1.0)
    assert model.exposed_gradient_seconds == pytest.approx(exposed)
    for overlapped, seconds in ((True, 10 * exposed), (False, 10.0)):
        cost = model.data_parallel(10, overlapped=overlapped)
        assert (cost.compute_seconds, cost.ranks) == (12.0, 2)
        assert cost.communication_seconds == pytest.approx(seconds)


def test_a_network_smaller_than_a_bucket_hides_nothing() -> None:
    small = CostModel(MODEL.allreduce, 100.0, 1, 25 * 2**20)
    assert small.exposed_gradient_seconds == small.gradient_seconds == pytest.approx(0.25)


def test_a_plan_costs_what_its_rounds_cost() -> None:
    schedule = ConstantSchedule(0.1, 10)
    # 4 steps that average gradients, then rounds of 3, 3
    plan = Plan(schedule, PostLocalRule(4, 3))
    assert MODEL.run(plan, overlapped=False).communication_seconds == pytest.approx(6.0)
    assert MODEL.run(plan, overlapped=True).communication_seconds == pytest.approx(4 * 0.25 + 2)
    assert MODEL.run(plan, overlapped=True).compute_seconds == pytest.approx(12.0)
    local = Plan(schedule, ConstantRule(4))  # 4, 4, 2
    for overlapped in (False, True):
        assert MODEL.run(local, overlapped=overlapped).total_seconds == pytest.approx(12.0 + 3.0)
        gradients = MODEL.run(Plan(schedule, EveryStepRule()), overlapped=overlapped)
        assert gradients == MODEL.data_parallel(10, overlapped=overlapped)


def test_moments_take_an_allreduce_of_their_own_at_the_end_of_local_rounds() -> None:
    link = Link(2, 2, 100 * 2**20, 0.01)
    model = CostModel(link, 1.2, 1, 100 * 2**20, moment_bytes=200 * 2**20)
    assert model.gradient_seconds == pytest.approx(1.02)
    assert model.average_seconds == pytest.approx(1.02 + 2.02)
    plan = Plan(ConstantSchedule(0.1, 10), PostLocalRule(4, 3))
    assert model.run(plan, overlapped=False).communication_seconds == pytest.approx(
        4 * 1.02 + 2 * 3.04
    )
    assert averaged_bytes(plan, 1000, 2000) == 6 * 1000 + 2 * 2000
    assert averaged_bytes(plan, 1000) == 6000


@pytest.mark.parametrize(
    ("delay_steps", "seconds"),
    #  three averages of 1 s, the last of which nothing hides; a step takes 0.4 s
    [(0, 3.0), (1, 0.6 + 0.6 + 1), (2, 0.2 + 0.2 + 1), (3, 1.0)],
)
def test_a_delay_hides_all_averages_but_the_last(delay_steps: int, seconds: float) -> None:
    link = Link(2, 2, 100 * 2**20, 0.0)
    model = CostModel(link, 0.4, 1, 100 * 2**20, delay_steps=delay_steps)
    plan = Plan(ConstantSchedule(0.1, 10), ConstantRule(4))
    cost = model.run(plan, overlapped=True)
    assert cost.communication_seconds == pytest.approx(seconds)
    assert cost.compute_seconds == pytest.approx(4.0)


def test_ranks_wait_for_the_slowest() -> None:
    # an all-reduce takes 1 s, of which 0.25 s are left over if it overlaps
    model = replace(MODEL, waiting_seconds=0.1)
    assert model.data_parallel(10, overlapped=False).communication_seconds == pytest.approx(11.0)
    assert model.data_parallel(10, overlapped=True).communication_seconds == pytest.approx(3.5)
    # rounds of 4, 4 and 1 steps: twice, twice and once as long
    plan = Plan(ConstantSchedule(0.1, 9), ConstantRule(4))
    assert model.run(plan, overlapped=False).communication_seconds == pytest.approx(3.0 + 0.5)
    assert model.run(plan, overlapped=False).compute_seconds == pytest.approx(9 * 1.2)
    # behind a step of 1.2 s there is nothing left of 1.2 s, but for the last average
    late = replace(model, delay_steps=1)
    assert late.run(plan, overlapped=False).communication_seconds == pytest.approx(1.1)


def test_a_measured_step_comes_before_the_formula() -> None:
    model = replace(MODEL, waiting_seconds=0.1, overlapped_step_seconds=1.3)
    assert model.exposed_gradient_seconds == pytest.approx(0.1)
    assert model.data_parallel(10, overlapped=True).total_seconds == pytest.approx(13.0)
    # faster than the computing alone: within the scatter of two measurements
    faster = replace(MODEL, overlapped_step_seconds=1.1)
    assert faster.exposed_gradient_seconds == 0.0


def test_bytes_and_hours_of_gpus() -> None:
    assert ring_bytes(1, 100) == 0
    assert ring_bytes(4, 100) == 150
    cost = RunCost(compute_seconds=3600.0, communication_seconds=1800.0, ranks=16)
    assert (cost.total_seconds, cost.gpu_hours) == (5400.0, 24.0)


# two machines of four ranks, each machine one worker: 100 MiB/s between them, 400 within
PARTS = AverageOfParts(Link(2, 2, 100 * 2**20, 0.0), Link(4, 1, 400 * 2**20, 0.0), share=1.0)
HYBRID = CostModel(Link(8, 2, 100 * 2**20, 0.0), 1.2, 1, 100 * 2**20, parts=PARTS)


def test_workers_of_several_ranks() -> None:
    plan = Plan(ConstantSchedule(0.1, 10), ConstantRule(4))  # 4, 4, 2
    # all ranks: 2 x 7/8 x 1 s. Among the workers: 1 s. Among the ranks of one: 6/4 x 1/4 s, and
    # half as long to gather the parts
    assert HYBRID.gradient_seconds == pytest.approx(1.75)
    assert HYBRID.average_seconds == pytest.approx(1.0 + 0.375 / 2)
    cost = HYBRID.run(plan, overlapped=False)
    assert cost.communication_seconds == pytest.approx(3 * 1.1875)
    assert cost.compute_seconds == pytest.approx(10 * (1.2 + 0.375))
    assert cost.ranks == 8
    # DDP hides all but the last bucket, a quarter, behind 0.8 s
    hiding = replace(HYBRID, overlap_within_workers=True).run(plan, overlapped=False)
    assert hiding.compute_seconds == pytest.approx(10 * (1.2 + 0.375 / 4))
    # not in a plan that averages over all ranks as well: 4 data parallel steps, 6 local ones
    mixed = Plan(ConstantSchedule(0.1, 10), PostLocalRule(4, 3))
    cost = replace(HYBRID, overlap_within_workers=True).run(mixed, overlapped=False)
    assert cost.compute_seconds == pytest.approx(10 * 1.2 + 6 * 0.375)
    assert cost.communication_seconds == pytest.approx(4 * 1.75 + 2 * 1.1875)
    assert HYBRID.data_parallel(10, overlapped=False).total_seconds == pytest.approx(12 + 17.5)


def test_bytes_over_the_link_of_a_machine() -> None:
    parameters = 100 * 2**20
    plan = Plan(ConstantSchedule(0.1, 10), PostLocalRule(4, 3))
    assert HYBRID.bytes_per_link(plan) == pytest.approx((4 * 1.75 + 2 * 1.0) * parameters)
    flat = replace(HYBRID, parts=None)
    assert flat.bytes_per_link(plan) == pytest.approx(6 * 1.75 * parameters)
    assert replace(HYBRID, allreduce=Link(8, 1, 1.0, 0.0)).bytes_per_link(plan) == 0
    # a worker on two machines: each of their links carries half
    spread = replace(HYBRID, parts=replace(PARTS, share=0.5))
    assert spread.bytes_per_link(plan) == pytest.approx((4 * 1.75 + 2 * 0.5) * parameters)
