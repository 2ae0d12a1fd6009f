"""Local SGD on a small problem: K workers x S seeds as one tensor program, with the trainer's
plans."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qsr.core.open_plan import AnyPlan, OpenPlan
from qsr.core.seeds import seed_for
from qsr.evidence.problems import Problem
from qsr.evidence.settings import OuterConfig

_CHUNK = 200
"""Number of steps whose random numbers are drawn at once."""


@dataclass(frozen=True)
class Outcome:
    """Results of all seeds under one plan."""

    volume: float
    diverged: list[bool]
    """Per seed: whether a parameter is not finite, or the training loss is larger than noise alone
    can explain."""
    measured: dict[str, list[float]]
    """Measurements of the averaged model, per seed; meaningless for a seed that diverged."""
    steps: int
    peak_lr: float


def join(parts: Sequence[Outcome]) -> Outcome:
    """One outcome of all seeds, from those of different seeds of one arm."""
    first = parts[0]
    return Outcome(
        volume=statistics.fmean(part.volume for part in parts),
        diverged=[each for part in parts for each in part.diverged],
        measured={
            name: [value for part in parts for value in part.measured[name]]
            for name in first.measured
        },
        steps=first.steps,
        peak_lr=first.peak_lr,
    )


class TimeAverage(Protocol):
    """An average of the models after the steps of a run."""

    def newest(self, step: int, total_steps: int) -> float:
        """Weight of the model after `step` in the average so far; 0: it is not in it."""


@dataclass(frozen=True)
class MovingAverage:
    """Exponential: all weights so far shrink by `decay` in every step. It begins with the initial
    model."""

    decay: float

    def newest(self, step: int, total_steps: int) -> float:
        return 1.0 - self.decay


@dataclass(frozen=True)
class LastAverage:
    """Uniform over this last part of the steps."""

    share: float

    def newest(self, step: int, total_steps: int) -> float:
        first = total_steps - max(1, round(self.share * total_steps))
        return 0.0 if step < first else 1.0 / (step - first + 1)


def simulate(
    problem: Problem,
    plan: AnyPlan,
    seeds: Sequence[int],
    *,
    workers: int,
    local_batch: int,
    label_noise: float,
    average: TimeAverage | None = None,
    outer: OuterConfig | None = None,
) -> Outcome:
    """Train by SGD. In each step every worker draws `local_batch` training samples, with
    replacement, and noise of standard deviation `label_noise` for each of their outputs. The draws
    of a seed depend only on the seed, the number of workers and the batch: they are the same under
    all plans and with any other seeds.

    With `average`, the measured model is an average over the steps, of the workers' mean after
    each. With `outer`, that optimizer takes a step at the end of every round. The seeds
    share the rounds of a rule that needs the loss: give one seed."""
    state = [
        start.unsqueeze(1).repeat(1, workers, *[1] * (start.dim() - 1)).requires_grad_()
        for start in problem.start()
    ]
    draws = _draws(problem, plan.total_steps, seeds, workers, local_batch)
    averaged = [values.detach()[:, 0].clone() for values in state]
    end_round = _mean_workers if outer is None else OuterSteps(state, outer)
    num_rounds = 0
    for round_ in plan.rounds():
        total_loss = torch.zeros(())
        for step in range(round_.start, round_.end):
            samples, noise = next(draws)
            loss = problem.losses(state, samples, label_noise * noise).sum()
            gradients = torch.autograd.grad(loss, state)
            total_loss += loss.detach()
            lr = plan.schedule(step)
            with torch.no_grad():
                for values, gradient in zip(state, gradients, strict=True):
                    if round_.averages == "gradients":
                        gradient = gradient.mean(1, keepdim=True)
                    values.sub_(gradient, alpha=lr)
                if average is not None and (weight := average.newest(step, plan.total_steps)):
                    for mean, values in zip(averaged, state, strict=True):
                        mean.lerp_(values.mean(1), weight)
        num_rounds += 1
        if isinstance(plan, OpenPlan):
            mean_loss = float(total_loss) / (round_.length * len(seeds) * workers)
            if not math.isfinite(mean_loss):  # it has diverged, and goes on to its end
                mean_loss = plan.losses[-1] if plan.losses else 1.0
            plan.observe(mean_loss)
        if round_.averages == "parameters":
            with torch.no_grad():
                end_round(state)
    with torch.no_grad():
        model = [values[:, 0] for values in state] if average is None else averaged
        measured = problem.measure(model)
    return Outcome(
        volume=num_rounds / plan.total_steps,
        diverged=_diverged(model, measured["train_loss"]).tolist(),
        measured={name: values.tolist() for name, values in measured.items()},
        steps=plan.total_steps,
        peak_lr=plan.schedule(0),
    )


def _mean_workers(state: Sequence[Tensor]) -> None:
    for values in state:
        values.copy_(values.mean(1, keepdim=True).expand_as(values))


class OuterSteps:
    """The steps of an outer optimizer, from the model before the first round."""

    def __init__(self, state: Sequence[Tensor], settings: OuterConfig) -> None:
        self._model = [values.detach()[:, :1].clone() for values in state]
        self._optimizer = torch.optim.SGD(
            self._model, settings.lr, settings.momentum, nesterov=True
        )

    def __call__(self, state: Sequence[Tensor]) -> None:
        """Take a step, and give the new model to all workers."""
        for model, values in zip(self._model, state, strict=True):
            model.grad = model - values.mean(1, keepdim=True)
        self._optimizer.step()
        for model, values in zip(self._model, state, strict=True):
            values.copy_(model.expand_as(values))


def _diverged(model: Sequence[Tensor], train_loss: Tensor) -> Tensor:
    finite = torch.stack([values.flatten(1).isfinite().all(1) for values in model]).all(0)
    return ~finite | ~(train_loss < 1)


def _draws(
    problem: Problem, steps: int, seeds: Sequence[int], workers: int, local_batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples [seeds, workers, batch] and standard normal noise [..., outputs] for every step."""
    generators = [torch.Generator().manual_seed(seed_for(seed, "simulation")) for seed in seeds]
    for _ in range(0, steps, _CHUNK):
        shape = (_CHUNK, workers, local_batch)
        samples = torch.stack(
            [torch.randint(problem.train_size, shape, generator=g) for g in generators], dim=1
        )
        noise = torch.stack(
            [torch.randn(*shape, problem.outputs, generator=g) for g in generators], dim=1
        )
        yield from zip(samples, noise, strict=True)
