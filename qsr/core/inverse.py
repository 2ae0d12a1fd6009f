"""The inverse of a plan: alpha of the quadratic rule for a budget of rounds, or of what they cost.

A plan of N rounds takes N calls of the schedule. Here the rounds are counted in stretches of equal
H, some hundred of a run, so that many alphas can be tried.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from qsr.core.plan import Plan
from qsr.core.rules import CappedRule, QuadraticRule, Rule
from qsr.core.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    Schedule,
    StepSchedule,
)

DIGITS = 4
"""Significant digits of a solved alpha."""

_SAMPLES = 128
"""Rates that stand for a schedule in the first guess of alpha."""
_FIRST: int = 10 ** (DIGITS - 1)
_PER_DECADE: int = 9 * _FIRST


class Stretch(NamedTuple):
    """Consecutive rounds of the same length. `start` is the 0-based step of the first, `length`
    their H in steps."""

    start: int
    length: int
    rounds: int


Cost = Callable[[int, bool], float]
"""What a round of H steps costs, in any unit, and whether it is the run's last. It must not grow
faster than H."""


def one_each(h: int, last: bool) -> float:
    """The cost for a budget of rounds."""
    return 1.0


def never_rises(schedule: Schedule) -> bool:
    """Whether the rate is known not to rise after the warm-up: that of our own schedules."""
    if isinstance(schedule, PowerOfTwoSchedule):
        return never_rises(schedule.schedule)
    return isinstance(
        schedule,
        ConstantSchedule | CosineSchedule | ExponentialSchedule | LinearSchedule | StepSchedule,
    )


def stretches(schedule: Schedule, rule: Rule) -> list[Stretch]:
    """The rounds of Plan(schedule, rule), for a rule whose H depends on the rate alone and grows
    as it falls. Where the rate may rise, it takes as long as the plan."""
    if never_rises(schedule):
        return list(_leap(schedule, rule))
    rounds = itertools.groupby(Plan(schedule, rule).rounds(), key=lambda round_: round_.length)
    found = []
    for length, group in rounds:
        members = list(group)
        found.append(Stretch(members[0].start, length, len(members)))
    return found


def _leap(schedule: Schedule, rule: Rule) -> Iterator[Stretch]:
    """H never falls during the run, so all rounds between two of the same H have this H too."""
    total, warmup = schedule.total_steps, schedule.warmup_steps

    def length_at(step: int) -> int:
        length = rule.length(step, schedule(max(step, warmup)))
        return total if length is None else length

    start, guess = 0, 1
    while start < total:
        h = length_at(start)
        complete = (total - start) // h
        if not complete:
            yield Stretch(start, total - start, 1)
            return
        # of the next rounds, the one numbered `same` has this H, the one numbered `other` has not
        same, other, step = 1, complete + 1, max(1, guess // 4)
        probe = min(guess, complete)
        while same < probe < other:
            if length_at(start + (probe - 1) * h) == h:
                same, probe, step = probe, probe + step, 2 * step
            else:
                other = probe
        while other - same > 1:
            middle = (same + other) // 2
            if length_at(start + (middle - 1) * h) == h:
                same = middle
            else:
                other = middle
        yield Stretch(start, h, same)
        start, guess = start + same * h, same + 1


def cost_of(rounds: Sequence[Stretch], cost: Cost) -> float:
    """What all rounds cost."""
    end = rounds[-1].length
    once = sum(each.rounds * cost(each.length, False) for each in rounds)
    return once - cost(end, False) + cost(end, True)


def cost_range(
    schedule: Schedule, h_base: int, cost: Cost = one_each, h_max: int | None = None
) -> tuple[float, float]:
    """The least and the most that the quadratic rule's rounds cost, over all alphas."""
    limits = (sys.float_info.max, sys.float_info.min)
    least, most = (
        cost_of(stretches(schedule, _rule(h_base, alpha, h_max)), cost) for alpha in limits
    )
    return least, most


class Solved(NamedTuple):
    """An alpha, and the rounds of its plan."""

    alpha: float
    rounds: list[Stretch]


def solve_alpha(
    schedule: Schedule,
    h_base: int,
    budget: float,
    cost: Cost = one_each,
    h_max: int | None = None,
) -> Solved | None:
    """The smallest alpha of DIGITS significant digits with which the quadratic rule's rounds cost
    at most `budget`. None: with none, or with every alpha.

    Where the rate may rise after the warm-up, a smaller alpha might do as well.
    """
    least, most = cost_range(schedule, h_base, cost, h_max)
    if not least <= budget < most:
        return None
    tried: dict[int, list[Stretch]] = {}

    def spent(index: int) -> float:
        if index not in tried:
            tried[index] = stretches(schedule, _rule(h_base, _grid(index), h_max))
        return cost_of(tried[index], cost)

    roughly = _Rough(schedule, h_base, cost, h_max)
    first = roughly.alpha(budget)
    # the sum is off by about as much at the first guess as at the solution
    corrected = budget * roughly.spent(first) / spent(_index(first))
    before, index = _index(first), _index(roughly.alpha(corrected))
    if spent(index) != spent(before):  # where they differ, a straight line through both is closer
        slope = (spent(index) - spent(before)) / (index - before)
        jump = (budget - spent(index)) / slope
        index += round(max(-_PER_DECADE, min(jump, _PER_DECADE)))
    step = -1 if spent(index) <= budget else 1
    while (spent(index + step) <= budget) == (step < 0):
        index, step = index + step, 2 * step
    low, high = sorted((index, index + step))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return Solved(_grid(high), tried[high])


def _rule(h_base: int, alpha: float, h_max: int | None) -> Rule:
    rule = QuadraticRule(h_base, alpha)
    return rule if h_max is None else CappedRule(rule, h_max)


def _grid(index: int) -> float:
    """The alphas of DIGITS significant digits, in rising order; index 0 is 1."""
    decade, rest = divmod(index, _PER_DECADE)
    return float(f"{_FIRST + rest}e{decade - DIGITS + 1}")


def _index(alpha: float) -> int:
    """Of the alpha of DIGITS significant digits next to `alpha`."""
    digits, _, decade = f"{alpha:.{DIGITS - 1}e}".partition("e")
    return int(decade) * _PER_DECADE + int(digits.replace(".", "")) - _FIRST


class _Rough:
    """The cost of all rounds as a sum over sampled rates: each stands for steps / H rounds."""

    def __init__(self, schedule: Schedule, h_base: int, cost: Cost, h_max: int | None) -> None:
        self.total, warmup = schedule.total_steps, schedule.warmup_steps
        decay = self.total - warmup
        samples = min(decay, _SAMPLES)
        steps = (warmup + (2 * i + 1) * decay // (2 * samples) for i in range(samples))
        self.rates = [(schedule(step), decay / samples) for step in steps]
        self.rates.append((schedule(warmup), warmup))
        self.h_base, self.cost = h_base, cost
        self.most = min(self.total, h_max or self.total)

    def spent(self, alpha: float) -> float:
        found, most, h_base, cost = 0.0, self.most, self.h_base, self.cost
        at_base = cost(h_base, False) / h_base
        for rate, steps in self.rates:
            h = most
            if alpha < rate * most:  # so alpha / rate cannot overflow
                h = min(int((alpha / rate) ** 2) or 1, most)
            found += steps / h * cost(h, False) if h > h_base else steps * at_base
        return found

    def alpha(self, budget: float) -> float:
        rates = [rate for rate, _ in self.rates if rate > 0]
        low, high = min(rates) / 2, 2 * max(rates) * math.sqrt(self.total)
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.spent(middle) <= budget else (middle, high)
        return high
