"""The plan of a run whose rule needs the loss: a round is known when the one before has ended."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from qsr.core.plan import Plan, Round, cut_round
from qsr.core.rules import Rule
from qsr.core.schedules import Schedule


class OpenPlan:
    """The rounds so far of a learning-rate schedule and a rule that needs the loss.

    They are cut as in a `Plan`. All ranks tell it the same losses, so that all have the same
    rounds. Raises ValueError if the rule asks for a round that averages gradients.
    """

    averages_gradients = False
    averages_parameters = True

    def __init__(self, schedule: Schedule, rule: Rule) -> None:
        self.schedule = schedule
        self.losses: list[float] = []
        """The mean training loss of each round that has ended."""
        self.rule = rule
        """The rule of the next round."""
        self._rounds: list[Round] = []

    @property
    def total_steps(self) -> int:
        """Steps in the run, T."""
        return self.schedule.total_steps

    def rounds(self, from_step: int = 0) -> Iterator[Round]:
        """The rounds that end after `from_step`, in order. `observe` must be called at the end of
        each, before the next one is asked for."""
        step = from_step
        while step < self.total_steps:
            round_ = self.round_at(step)
            yield round_
            step = round_.end

    def round_at(self, step: int) -> Round:
        """The round that holds `step`: one of those so far, or the next one."""
        if step >= self._end < self.total_steps and len(self.losses) == len(self._rounds):
            self._cut(self._end)
        if not 0 <= step < self._end:
            raise ValueError(f"the round of step {step} is not known yet")
        return self._rounds[bisect_right(self._rounds, step, key=lambda r: r.start) - 1]

    def observe(self, loss: float) -> None:
        """The mean training loss of the round that has just ended."""
        self.losses.append(loss)
        self.rule = self.rule.observe(loss)

    def load(self, losses: Iterable[float]) -> None:
        """Repeat the rounds of an earlier session, which are given by their losses."""
        for loss in losses:
            self._cut(self._end)
            self.observe(loss)

    @property
    def _end(self) -> int:
        """The first step after the rounds so far."""
        return self._rounds[-1].end if self._rounds else 0

    def _cut(self, start: int) -> None:
        lr = self.schedule(start)
        decides = self.schedule(max(start, self.schedule.warmup_steps))
        round_ = cut_round(self.rule, len(self._rounds), start, lr, decides, self.total_steps)
        if round_.averages == "gradients":
            raise ValueError(
                f"the round at step {start} averages gradients, which a rule that needs the loss "
                f"cannot ask for"
            )
        self._rounds.append(round_)
        self.rule = self.rule.after(decides)


AnyPlan = Plan | OpenPlan
"""What a trainer follows."""
