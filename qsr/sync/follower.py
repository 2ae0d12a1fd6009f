"""The rounds of a training loop that is not ours, one after another."""

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch

from qsr.core.plan import Plan, Round, cut_round
from qsr.core.rules import Rule
from qsr.errors import TrainingError

_PATIENCE = 32
"""Steps after which calls of `advance` are compared with those of the optimizer."""


class RoundFollower:
    """Counts the steps of a loop and cuts them into rounds.

    The learning rate of a round's first step is the one that torch's optimizer uses in it: a hook
    of the optimizer reads it, so the scheduler may step before or after. If GradScaler skips that
    very update, the rate of this moment is read, or, once the scheduler was seen to step first, the
    rate of the end of the last round.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule | None,
        plan: Plan | None,
        total_steps: int | None,
        warmup_steps: int,
        peak_lr: float | None,
        param_group: int | None,
    ) -> None:
        """The arguments of `LocalSGD`. Raises ValueError."""
        _check(rule, plan, total_steps, warmup_steps, peak_lr)
        first_rule = rule if plan is None else plan.rule
        assert first_rule is not None
        self.plan = plan
        self.total_steps = (total_steps or 0) if plan is None else plan.total_steps
        self.steps_done = 0
        """Completed steps."""
        self.round: Round | None = None
        """The round of the step in progress; None between two rounds."""
        self.last: Round | None = None
        """The last round that has begun."""
        warmup = f", warmup_steps={warmup_steps}, peak_lr={peak_lr}" if warmup_steps else ""
        schedule = "" if plan is None else f", {plan.schedule!r}"
        self.description = f"{first_rule!r}{schedule}, total_steps={self.total_steps}{warmup}"
        """The arguments that decide the rounds."""
        self._optimizer, self._param_group = optimizer, param_group
        self._rule, self._warmup_steps, self._after_warmup = first_rule, warmup_steps, peak_lr
        self._updates = 0  # calls of optimizer.step
        self._updates_of_step = 0
        self._rate_before: float | None = self._rate()  # at the end of the last round
        self._rate_used = 0.0  # in the last update
        self._summed = 0.0  # of the steps of the round
        self._scheduler_first = False  # whether it was seen to step before `advance`

    def count_update(self) -> None:
        """Call at the beginning of every optimizer.step()."""
        self._updates += 1
        self._updates_of_step += 1
        self._rate_used = self._rate()

    @property
    def ended(self) -> bool:
        """Whether all steps of the run are done."""
        return self.steps_done >= self.total_steps

    def begin(self) -> Round:
        """The first step of a new round begins. Raises TrainingError if the run has ended, or if
        the rate is not the plan's."""
        if self.ended:
            raise TrainingError(
                f"the run has total_steps={self.total_steps}, and all are done: no more steps"
            )
        step, lr = self.steps_done, self._rate()
        skipped = self._updates_of_step == 0
        if skipped and self._rate_before is not None and (self._scheduler_first or step == 0):
            lr = self._rate_before
        if self.plan is not None:
            self.round = self._planned(self.plan, lr)
        else:
            decides = lr if step >= self._warmup_steps else self._after_warmup
            assert decides is not None
            index = 0 if self.last is None else self.last.index + 1
            self.round = cut_round(self._rule, index, step, lr, decides, self.total_steps)
            self._rule = self._rule.after(decides)
        self.last, self._summed = self.round, 0.0
        return self.round

    @property
    def summed_lr(self) -> float:
        """The sum of the learning rates of the last round's steps so far; a skipped update counts
        with the rate of the update before."""
        if self.plan is None or self.last is None:
            return self._summed
        return math.fsum(map(self.plan.schedule, range(self.last.start, self.steps_done)))

    def _planned(self, plan: Plan, lr: float) -> Round:
        round_ = plan.round_at(self.steps_done)
        if not math.isclose(lr, round_.lr, rel_tol=1e-3, abs_tol=1e-12):
            raise TrainingError(
                f"the optimizer's learning rate is {lr:g} in step {self.steps_done}, but the "
                f"plan's is {round_.lr:g}: give the plan the schedule that the optimizer follows, "
                f"or LocalSGD the rule instead of the plan"
            )
        return round_

    def advance(self) -> bool:
        """Count the step in progress; whether its round has ended. Raises TrainingError if calls of
        optimizer.step() or of this method are missing."""
        assert self.round is not None  # begin
        if self._rate_before is not None:
            self._scheduler_first |= self._rate() != self.round.lr
        self._rate_before = None
        self._check_calls()
        self.steps_done += 1
        self._updates_of_step = 0
        self._summed += self._rate_used
        return self.steps_done == self.round.end

    def end_round(self) -> None:
        """The round in progress has ended."""
        self.round, self._rate_before = None, self._rate()

    def _check_calls(self) -> None:
        if self._updates_of_step > 1:
            raise TrainingError(
                f"optimizer.step() ran {self._updates_of_step} times since the last sync.step(): "
                f"call sync.step() once after each"
            )
        if self.steps_done >= _PATIENCE and 2 * self._updates < self.steps_done:
            raise TrainingError(
                f"{self.steps_done} calls of sync.step() and only {self._updates} of "
                f"optimizer.step(): call sync.step() once per optimizer step, not per micro-batch"
            )

    def _rate(self) -> float:
        groups = self._optimizer.param_groups
        if self._param_group is not None:
            return float(groups[self._param_group]["lr"])
        return max(float(group["lr"]) for group in groups)

    def summary(self) -> dict[str, Any]:
        """Progress, for a tracker; with a plan also what it foresees."""
        last = self.last
        values: dict[str, Any] = {
            "step": self.steps_done,
            "total_steps": self.total_steps,
            "round": None if last is None else last.index,
            "h": None if last is None else last.length,
            "lr": None if last is None else last.lr,
        }
        if self.plan is not None:
            values["planned_averages"] = self.plan.num_rounds
            values["planned_volume"] = self.plan.volume
        return values

    def state_dict(self) -> dict[str, Any]:
        """What decides the rounds to come."""
        return {
            "steps_done": self.steps_done,
            "in_round": self.round is not None,
            "last": None if self.last is None else tuple(self.last),
            # fields, of which some rules change some from round to round
            "rule": asdict(self._rule) if is_dataclass(self._rule) else {},
            "summed_lr": self._summed,
            "scheduler_first": self._scheduler_first,
            "rate_before": self._rate_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned."""
        self.steps_done = self._updates = state["steps_done"]
        self.last = None if state["last"] is None else Round(*state["last"])
        self.round = self.last if state["in_round"] else None
        if state["rule"]:
            self._rule = _with_fields(self._rule, state["rule"])
        self._summed = state["summed_lr"]
        self._scheduler_first, self._rate_before = state["scheduler_first"], state["rate_before"]


def _with_fields(rule: Any, fields: Mapping[str, Any]) -> Any:
    """A rule with these fields, some of which may be the fields of a rule inside it."""
    return replace(
        rule,
        **{
            name: _with_fields(getattr(rule, name), value) if isinstance(value, dict) else value
            for name, value in fields.items()
        },
    )


def _check(
    rule: Rule | None,
    plan: Plan | None,
    total_steps: int | None,
    warmup_steps: int,
    peak_lr: float | None,
) -> None:
    if (rule is None) == (plan is None):
        raise ValueError("give LocalSGD either a rule or a plan")
    if rule is not None and rule.needs_loss:
        raise ValueError(
            f"{type(rule).__name__} needs the training loss, which LocalSGD does not see: train "
            f"with qsr train, or replay the rounds of such a run (ReplayRule)"
        )
    if plan is not None and (total_steps is not None or warmup_steps or peak_lr is not None):
        raise ValueError("a plan has its own total_steps, warmup_steps and rates: leave them out")
    if plan is None and (total_steps is None or total_steps < 1):
        raise ValueError(
            "give total_steps, the number of optimizer steps in the run: the last round ends there"
        )
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps cannot be negative, got {warmup_steps}")
    if warmup_steps and (peak_lr is None or peak_lr <= 0):
        raise ValueError(
            "give peak_lr, the learning rate of the first step after the warm-up: it decides H "
            "within the warm-up"
        )
