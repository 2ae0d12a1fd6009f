"""Local SGD on a small problem: K workers x S seeds as one tensor program, with the trainer's
plans."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsr.core.plan import Plan
from qsr.core.seeds import seed_for
from qsr.evidence.problems import Problem

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


def simulate(
    problem: Problem,
    plan: Plan,
    seeds: Sequence[int],
    *,
    workers: int,
    local_batch: int,
    label_noise: float,
) -> Outcome:
    """Train by SGD. In each step every worker draws `local_batch` training samples, with
    replacement, and noise of standard deviation `label_noise` for each of their outputs. The draws
    of a seed depend only on the seed, the number of workers and the batch: they are the same under
    all plans and with any other seeds."""
    state = [
        start.unsqueeze(1).repeat(1, workers, *[1] * (start.dim() - 1)).requires_grad_()
        for start in problem.start()
    ]
    draws = _draws(problem, plan.total_steps, seeds, workers, local_batch)
    for round_ in plan.rounds():
        for step in range(round_.start, round_.end):
            samples, noise = next(draws)
            loss = problem.losses(state, samples, label_noise * noise).sum()
            gradients = torch.autograd.grad(loss, state)
            lr = plan.schedule(step)
            with torch.no_grad():
                for values, gradient in zip(state, gradients, strict=True):
                    if round_.averages == "gradients":
                        gradient = gradient.mean(1, keepdim=True)
                    values.sub_(gradient, alpha=lr)
        if round_.averages == "parameters":
            with torch.no_grad():
                for values in state:
                    values.copy_(values.mean(1, keepdim=True).expand_as(values))
    with torch.no_grad():
        model = [values[:, 0] for values in state]
        measured = problem.measure(model)
    return Outcome(
        volume=plan.volume,
        diverged=_diverged(model, measured["train_loss"]).tolist(),
        measured={name: values.tolist() for name, values in measured.items()},
    )


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
