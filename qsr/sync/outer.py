"""An outer optimizer: momentum over rounds, a change of the algorithm, off by default.

DiLoCo (Douillard et al. 2023, Algorithm 1) takes what a round has moved the workers' mean as a
gradient, and lets SGD with Nesterov momentum make the step. With a learning rate of 1 and without
momentum that step ends at the mean, which is Local SGD.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qsr.core.outer import OuterOptions
from qsr.sync.replica import local

PREFIX = "outer/"
"""Prefix of the state's names in a checkpoint."""


class OuterOptimizer:
    """Moves the workers' mean on, at the end of each round of local steps.

    `replicas`: for each worker of this rank, its parameters by name. Takes the memory of two models
    per rank, and during a step of a third. Every rank makes the same step, so that nothing is sent.
    """

    def __init__(
        self, replicas: Sequence[Mapping[str, nn.Parameter]], options: OuterOptions
    ) -> None:
        self._replicas, self._options = replicas, options
        self._start = [tensor.clone() for tensor in self._tensors(0)]
        self._sgd = torch.optim.SGD(
            self._start, options.lr, options.momentum, nesterov=options.nesterov
        )
        self._in_round = False

    def begin_round(self) -> None:
        """Call before the first step of a round of local steps: all workers are equal."""
        torch._foreach_copy_(self._start, self._tensors(0))
        self._in_round = True

    def step(self, summed_lr: float) -> None:
        """Call at the end of a round, when the replicas hold the mean of the workers: move them to
        where the next round starts. `summed_lr`: the sum of the round's learning rates."""
        scale = summed_lr if self._options.rate_correction and summed_lr > 0 else 1.0
        for start, mean in zip(self._start, self._tensors(0), strict=True):
            start.grad = (start - mean).div_(scale)
        self._sgd.param_groups[0]["lr"] = self._options.lr * scale
        self._sgd.step()
        self._sgd.zero_grad()
        for number in range(len(self._replicas)):
            torch._foreach_copy_(self._tensors(number), self._start)
        self._in_round = False

    def _tensors(self, number: int) -> list[Tensor]:
        """The parameters of one of this rank's workers, wherever they are now."""
        return [local(parameter) for parameter in self._replicas[number].values()]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, equal on all workers: the momentum, and within a round also
        where it started."""
        found = {}
        for name, start in zip(self._replicas[0], self._start, strict=True):
            if self._in_round:
                found[f"{PREFIX}start/{name}"] = start
            momentum = self._sgd.state[start].get("momentum_buffer")
            if momentum is not None:
                found[f"{PREFIX}momentum/{name}"] = momentum
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, start in zip(self._replicas[0], self._start, strict=True):
            stored = tensors.get(f"{PREFIX}start/{name}")
            if stored is not None:
                start.copy_(stored)
                self._in_round = True
            momentum = tensors.get(f"{PREFIX}momentum/{name}")
            if momentum is not None:
                self._sgd.state[start]["momentum_buffer"] = momentum.to(start.device).clone()


def make_outer(
    replicas: Sequence[Mapping[str, nn.Parameter]], options: OuterOptions
) -> OuterOptimizer | None:
    """The outer optimizer, if the options ask for more than the mean."""
    return None if options.ends_at_mean else OuterOptimizer(replicas, options)
