"""The plan of a run: every round, known before the first step."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from qsr.core.rules import Averages, Rule
from qsr.core.schedules import Schedule


class Round(NamedTuple):
    """Consecutive steps between two averages.

    `start` is the 0-based step it begins with, `length` its H, and `lr` the learning rate of its
    first step. `averages` says whether the workers average their gradients (data parallel; such a
    round has one step) or, at the round's end, their parameters.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which rounds have no use for
    start: int
    length: int
    lr: float
    averages: Averages = "parameters"

    @property
    def end(self) -> int:
        """The first step after the round."""
        return self.start + self.length


def cut_round(
    rule: Rule, index: int, start: int, lr: float, decides: float, total_steps: int
) -> Round:
    """The round that begins at `start` with the rate `lr`, where `decides` is the rate that decides
    H; it ends with the run at the latest."""
    length, remaining = rule.length(start, decides), total_steps - start
    length = remaining if length is None else min(length, remaining)
    return Round(index, start, length, lr, rule.averages(start))


@dataclass(frozen=True)
class Plan:
    """All rounds of a run: a learning-rate schedule cut by a synchronization rule.

    - H is decided by the learning rate of the round's first step (Gu et al. 2024, section 2).
    - Inside the warm-up it is decided by the first step after it instead, because the small rates
      there would ask for enormous H; a round that starts in the warm-up keeps its H across the
      border.
    - The last round is cut to end at the last step, under every rule, so that training always
      ends on an averaged model.
    """

    schedule: Schedule
    rule: Rule

    @property
    def total_steps(self) -> int:
        """Steps in the run, T."""
        return self.schedule.total_steps

    @property
    def num_rounds(self) -> int:
        """Averages in the run."""
        return len(self._rounds)

    @property
    def volume(self) -> float:
        """Rounds / steps: communication relative to one all-reduce per step."""
        return self.num_rounds / self.total_steps

    @property
    def longest_round(self) -> Round:
        """The (first) round with the largest H."""
        return max(self._rounds, key=lambda r: r.length)

    @property
    def averages_gradients(self) -> bool:
        """Whether some rounds do."""
        return self.gradient_rounds > 0

    @property
    def averages_parameters(self) -> bool:
        """Whether some rounds do."""
        return self.gradient_rounds < self.num_rounds

    @cached_property
    def gradient_rounds(self) -> int:
        """Rounds that average gradients: the data parallel part of the run, in steps."""
        return sum(r.averages == "gradients" for r in self._rounds)

    def rounds(self, from_step: int = 0) -> Iterator[Round]:
        """The rounds that end after `from_step`, in order.

        The first is the round that holds from_step: it keeps its own start and length.
        """
        if not 0 <= from_step <= self.total_steps:
            raise ValueError(f"from_step {from_step} lies outside 0..{self.total_steps}")
        if from_step == self.total_steps:
            return iter(())
        first = self.round_at(from_step).index
        return iter(self._rounds[first:] if first else self._rounds)

    def round_at(self, step: int) -> Round:
        """The round that holds `step`."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} lies outside 0..{self.total_steps - 1}")
        return self._rounds[bisect_right(self._rounds, step, key=lambda r: r.start) - 1]

    @cached_property
    def _rounds(self) -> tuple[Round, ...]:
        schedule, rule = self.schedule, self.rule
        total, warmup = schedule.total_steps, schedule.warmup_steps
        after_warmup = schedule(warmup)
        rounds: list[Round] = []
        start = 0
        while start < total:
            lr = schedule(start)
            decides = lr if start >= warmup else after_warmup
            round_ = cut_round(rule, len(rounds), start, lr, decides, total)
            rounds.append(round_)
            start = round_.end
            rule = rule.after(decides)
        return tuple(rounds)
