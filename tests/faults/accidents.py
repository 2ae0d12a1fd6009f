"""Nets in which something happens in the middle of a run, on one rank."""

import os
from collections.abc import Callable

from torch import Tensor, nn

from tests.support import batchnorm_net


class _Net(nn.Module):
    def __init__(self, accident: "Accident") -> None:
        super().__init__()
        self.net = batchnorm_net()
        self.accident = accident
        self.due = int(os.environ["RANK"]) == accident.rank
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.due and self.training == (self.accident.mode == "train"):
            self.calls += 1
            if self.calls == self.accident.at:
                self.accident.action()
        result: Tensor = self.net(images)
        return result


class Accident:
    """Makes nets that call `action` in their `at`-th forward pass in `mode` ("train" or "eval") on
    `rank`. A class, because processes get it pickled."""

    def __init__(self, rank: int, mode: str, at: int, action: Callable[[], object]) -> None:
        self.rank, self.mode, self.at, self.action = rank, mode, at, action

    def __call__(self) -> nn.Module:
        return _Net(self)
