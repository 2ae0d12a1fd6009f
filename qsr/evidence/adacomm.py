"""AdaComm (Wang and Joshi 2019): rounds whose length depends on the training loss."""

import math
from dataclasses import dataclass

from qsr.core.rules import Rule


@dataclass(frozen=True)
class AdaCommRule(Rule):
    """H = ceil(h_base sqrt(peak_lr / lr x loss / first loss)), at least 1, where the losses are
    those of the last round and of the first one. Before a loss is known, their ratio is 1."""

    h_base: int
    peak_lr: float
    first_loss: float | None = None
    loss: float | None = None

    def length(self, start: int, lr: float) -> int:
        ratio = 1.0 if self.first_loss is None or self.loss is None else self.loss / self.first_loss
        if not math.isfinite(ratio):  # the run has diverged
            ratio = 1.0
        # a little less, so that rounding does not lengthen a round of h_base steps
        return max(1, math.ceil(self.h_base * math.sqrt(ratio * self.peak_lr / lr) - 1e-9))

    def after_loss(self, loss: float) -> "AdaCommRule":
        """The rule of the next round, after one with this mean training loss."""
        first = loss if self.first_loss is None else self.first_loss
        return AdaCommRule(self.h_base, self.peak_lr, first, loss)
