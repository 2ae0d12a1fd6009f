"""Budget -> alpha: the quadratic rules that keep to so many hours, or to a volume.

For each H_base the smallest alpha that keeps to the budget, with its exact rounds and hours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from qsr.config import schema
from qsr.config.planning import make_plan, make_sampler, parameter_count
from qsr.core.cost import CostModel
from qsr.core.inverse import Cost, Solved, cost_of, cost_range, one_each, solve_alpha
from qsr.core.schedules import Schedule
from qsr.errors import ConfigError, UnknownSpeedError
from qsr.planner.cost_model import make_cost_model
from qsr.planner.forecast import (
    Source,
    fitted_hours,
    known_classes,
    known_images,
    sources_of,
    unverified_times,
)

MOST_H_BASE, MOST_OF_CONSTANT = 4, 0.9
WHY_RECOMMENDED = (
    f"recommended: the largest H_base up to {MOST_H_BASE} with a tenth fewer averages than that "
    f"constant H; so in the paper's recipes, but a rule of thumb, untried on others"
)


@dataclass(frozen=True)
class Row:
    """One H_base with its alpha."""

    h_base: int
    alpha: float
    rounds: int
    volume: float
    """Rounds / steps."""
    hours: float | None
    """None without a speed profile that fits."""
    fitted: bool
    """Whether the speed profile was fitted to these hours."""
    h_at_peak: int
    """H of the first round, which the peak rate decides."""
    h_half_way: int
    """H of the round that holds the step in the middle of the run."""
    h_at_end: int
    """H of the last round, which the run's end may cut."""
    longest_round_steps: int


@dataclass(frozen=True)
class Solution:
    """The rules that keep to a budget."""

    budget: str
    """As typed, for example volume=10."""
    config: schema.Config
    """The run; its rule is the recommended one."""
    rows: tuple[Row, ...]
    recommended: Row
    steps: int
    steps_per_epoch: int
    unverified: bool
    """Whether the hours depend on an unverified constant."""
    sources: tuple[Source, ...]
    why_no_hours: str
    """Why the speed profile gives none; empty if it does."""

    @property
    def rule_settings(self) -> tuple[str, str]:
        """The recommended rule, as one types it."""
        best = self.recommended
        return f"sync.h_base={best.h_base}", f"sync.alpha={best.alpha:g}"


def solve(config: schema.Config, budget: str, parameters: int | None = None) -> Solution:
    """The quadratic rules with which a run keeps to a budget, "hours=22" or "volume=10" (percent).

    `config` is a run with the quadratic rule, whose h_base and alpha do not matter. `parameters` of
    the network are needed only for timm's networks. Raises ConfigError: for a budget that is no
    positive number, that no rule keeps or that every rule keeps, or of hours without a speed
    profile that fits the run.
    """
    assert isinstance(config.sync, schema.QuadraticSync)
    kind, limit = _parse(budget)
    if parameters is None:
        parameters = parameter_count(config.model, known_classes(config))
    model, why_no_hours = None, ""
    try:
        model = make_cost_model(config, parameters)
    except UnknownSpeedError as error:
        if kind == "hours":
            raise
        why_no_hours = str(error)
    images = known_images(config)
    schedule = make_plan(config, images).schedule
    steps = schedule.total_steps
    cost: Cost
    # a percentage may have been computed: 1e-6 allows for its rounding
    cost, most = one_each, limit / 100 * steps + 1e-6
    if kind == "hours":
        assert model is not None
        cost, most = _round_seconds(model), 3600 * limit - _compute_seconds(model, steps)
    found = list(_solve(schedule, config.sync, cost, most))
    if not found:
        raise ConfigError(f"{budget}: {_why_none(schedule, config.sync, cost, model, kind)}")
    rows = [_row(config, model, schedule, h_base, solved) for h_base, solved in found]
    recommended = _recommended(rows)
    sync = replace(config.sync, h_base=recommended.h_base, alpha=recommended.alpha)
    return Solution(
        budget=budget,
        config=replace(config, sync=sync),
        rows=tuple(rows),
        recommended=recommended,
        steps=steps,
        steps_per_epoch=make_sampler(config, images).steps_per_epoch,
        unverified=model is not None and "total" in unverified_times(config, overlapped=False),
        sources=sources_of(config) if model else (),
        why_no_hours=why_no_hours,
    )


def _parse(budget: str) -> tuple[str, float]:
    kind, _, text = budget.partition("=")
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        example = "hours=22" if kind == "hours" else "volume=10 for 10 %"
        raise ConfigError(f"{budget}: give a positive number, as in {example}")
    return kind, limit


def _solve(
    schedule: Schedule, sync: schema.QuadraticSync, cost: Cost, budget: float
) -> Iterator[tuple[int, Solved]]:
    """H_base and its solution, for H_base = 1, 2, 4, ... as long as there is one."""
    solved, smallest = None, 0
    h_base, most = _smallest_h_base(sync), min(schedule.total_steps, sync.h_max or math.inf)
    while h_base <= most:
        if h_base > smallest:  # otherwise H is always larger, and the solution the same
            solved = solve_alpha(schedule, h_base, budget, cost, sync.h_max)
            if solved is None:
                return
            smallest = min((each.length for each in solved.rounds[:-1]), default=0)
        assert solved is not None
        yield h_base, solved
        h_base *= 2


def _smallest_h_base(sync: schema.QuadraticSync) -> int:
    """The smallest power of two that a delay of the averages allows."""
    return 1 << sync.delay_steps.bit_length()


def _round_seconds(model: CostModel) -> Cost:
    step_seconds = model.local_step_seconds(overlapped=model.overlap_within_workers)
    return cache(lambda h, last: model.round_seconds(h, step_seconds, last=last))


def _compute_seconds(model: CostModel, steps: int) -> float:
    return steps * model.local_step_seconds(overlapped=model.overlap_within_workers)


def _row(
    config: schema.Config,
    model: CostModel | None,
    schedule: Schedule,
    h_base: int,
    solved: Solved,
) -> Row:
    rounds = solved.rounds
    steps, number = schedule.total_steps, sum(each.rounds for each in rounds)
    hours, fitted = None, False
    if model is not None:
        seconds = _compute_seconds(model, steps) + cost_of(rounds, _round_seconds(model))
        hours = seconds / 3600
        fitted = fitted_hours(config, model, steps, number) is not None
    return Row(
        h_base=h_base,
        alpha=solved.alpha,
        rounds=number,
        volume=number / steps,
        hours=hours,
        fitted=fitted,
        h_at_peak=rounds[0].length,
        h_half_way=next(each.length for each in reversed(rounds) if each.start <= steps // 2),
        h_at_end=rounds[-1].length,
        longest_round_steps=max(each.length for each in rounds),
    )


def _recommended(rows: Sequence[Row]) -> Row:
    """In the paper H_base is 2 or 4 (once 8, which was worse), and QSR saves 12 to 59 % of the
    averages of a constant H_base."""
    good = [
        row
        for row in rows
        if row.h_base <= MOST_H_BASE and row.h_base * row.volume <= MOST_OF_CONSTANT
    ]
    return good[-1] if good else rows[0]


def _why_none(
    schedule: Schedule,
    sync: schema.QuadraticSync,
    cost: Cost,
    model: CostModel | None,
    kind: str,
) -> str:
    """One line: what is feasible."""
    h_base, steps = _smallest_h_base(sync), schedule.total_steps
    least, most = cost_range(schedule, h_base, cost, sync.h_max)
    if kind == "volume":
        averages = "1 average" if least == 1 else f"{least:,.0f} averages"
        low, high = (100 * rounds / steps for rounds in (least, most))
        return (
            f"the least with {steps:,} steps is {averages}, {_digits(low, math.ceil)} %; give less "
            f"than {_digits(high)} (H = {h_base} throughout)"
        )
    assert model is not None
    compute = _compute_seconds(model, steps)
    low, high = ((compute + seconds) / 3600 for seconds in (least, most))
    if not least < most:
        return f"every rule takes {_digits(low)} h here, because its averages take no time"
    return (
        f"computing alone takes {_digits(compute / 3600)} h; give at least "
        f"{_digits(low, math.ceil)} (1 average) and less than {_digits(high)} (H = {h_base} "
        f"throughout)"
    )


def _digits(value: float, rounded: Callable[[float], float] = round) -> str:
    """With four digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{rounded(value / unit) * unit:.4g}"
