"""The mean training loss of each round, for rules that need it: equal on all ranks, and the same
bits however many ranks there are and wherever a session ended."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qsr.core.open_plan import OpenPlan
from qsr.core.plan import Round
from qsr.errors import TrainingError
from qsr.sync.communicator import Communicator

_UNIT = 2.0**-32
"""Losses are added up in whole multiples of this, because sums of integers do not depend on their
order."""
_LARGEST = 2.0**16
"""A larger loss counts as this much, so that 2^15 of them do not exceed the largest integer."""
_AT_ONCE = 256
"""Losses that are added up at once, because each addition takes as long as a small layer."""


class RoundLoss:
    """Collects the losses of this rank's micro-batches, and tells the plan their mean over all
    ranks at the end of each round. Losses that are not finite do not count."""

    def __init__(self, plan: OpenPlan, communicator: Communicator) -> None:
        self._plan, self._communicator = plan, communicator
        self._sums = torch.zeros(2, dtype=torch.int64, device=communicator.device)
        self._losses: list[Tensor] = []  # not yet in the sums

    def count(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch, a tensor on the device."""
        self._losses.append(loss)
        if len(self._losses) == _AT_ONCE:
            self._add()

    def _add(self) -> None:
        if self._losses:
            losses = torch.stack(self._losses).double()
            finite = losses.isfinite()
            units = (losses.where(finite, 0.0).clamp(max=_LARGEST) / _UNIT).round().long()
            self._sums += torch.stack((units.sum(), finite.sum()))
            self._losses.clear()

    def _totals(self) -> tuple[int, int]:
        """Collective: sum and number of the losses of the round so far, over all ranks."""
        self._add()
        units, number = self._communicator.total(self._sums).tolist()
        return units, number

    def end_round(self, round_: Round) -> None:
        """Collective: tell the plan the mean loss of the round that has ended. Raises TrainingError
        on every rank if no loss of the round is finite."""
        units, number = self._totals()
        if not number:
            raise TrainingError(
                f"no loss of round {round_.index} is finite, so that its rule cannot go on; "
                f"earlier checkpoints are untouched; try a lower schedule.peak_lr or "
                f"optimizer.clip_norm"
            )
        self._sums.zero_()
        self._plan.observe(units * _UNIT / number)

    def state(self) -> dict[str, Any]:
        """Collective: what a checkpoint must hold."""
        return {"losses": self._plan.losses, "of_round": self._totals()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._plan.load(state["losses"])
        if self._communicator.topology.is_main:
            self._sums.copy_(torch.tensor(state["of_round"]))
