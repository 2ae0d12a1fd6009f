"""The training loop of the paper's released code (github.com/hmgxr128/QSR), told again.

tests/unit/train/test_released_code.py holds the trainer against it, so it shares nothing with
`qsr`: a loop over steps and workers that does, in its order, what every process of the released
code does. Its processes are a list here, and an all-reduce is a mean over that list. Left out are
half precision, evaluation, logging and checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy
from torch import Tensor, nn

Batches = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, worker) -> all images and labels of that worker's step."""

Mixing = Callable[[int, int, int], tuple[float, Tensor]]
"""(step, worker, micro-batch) -> share of the partner, and the partner of each image."""


@dataclass(frozen=True)
class Recipe:
    """A command line of the released code."""

    workers: int
    local: bool
    """Whether workers average their parameters now and then, or their gradients in every step."""
    optimizer: str
    max_lr: float
    final_lr: float
    warmup_steps: int
    total_steps: int
    acc_times: int
    """Micro-batches in a step."""
    wd: float
    momentum: float = 0.9
    nesterov: bool = False
    gradient_clipping: float = math.inf
    label_smoothing: float = 0.0
    strong_aug: bool = False
    """Whether images are mixed."""
    alpha: float = 0.0
    power: float = 2.0
    min_h: int = 1
    init_h: int = 1
    """Local steps in a round of the warm-up."""
    avg_m: bool = False
    avg_v: bool = False

    def lr(self, step: int) -> float:
        """A straight line up to the peak, and half a cosine down."""
        span = self.max_lr - self.final_lr
        if step < self.warmup_steps:
            return self.final_lr + step * span / self.warmup_steps
        decay_steps = self.total_steps - self.warmup_steps
        angle = math.pi * ((step - self.warmup_steps) / decay_steps)
        return self.final_lr + 0.5 * span * (1 + math.cos(angle))

    def h(self, steps_done: int, lr: float) -> int:
        """Local steps of a round that starts after `steps_done`, with the rate `lr`."""
        if steps_done < self.warmup_steps:
            return self.init_h
        wanted = max(int((self.alpha / lr) ** self.power), self.min_h)
        return max(min(wanted, self.total_steps - steps_done), 1)


@dataclass
class Record:
    """What a run did, in the order in which it did it: step by step, in a step worker by worker,
    and of a worker micro-batch by micro-batch."""

    losses: list[float] = field(default_factory=list)
    """Of every micro-batch."""
    rates: list[float] = field(default_factory=list)
    """Of every update."""
    averaged_after: list[int] = field(default_factory=list)
    """Steps done at each average, be it of parameters or of gradients."""
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    """Each worker's parameters, BatchNorm statistics and optimizer states at the end."""


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The network's state and the optimizer's, by name."""
    states = {
        f"{name} {key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }
    return network.state_dict() | states


def train(
    recipe: Recipe, make_network: Callable[[], nn.Module], batches: Batches, mixing: Mixing
) -> Record:
    """All steps of a run whose workers start from equal networks."""
    record = Record()
    workers = [_Worker(recipe, make_network()) for _ in range(recipe.workers)]
    for worker in workers:
        worker.set_lr(recipe.lr(0))
    h = recipe.h(0, workers[0].lr)
    local_steps = 0
    for step in range(recipe.total_steps):
        gradients = []
        for index, worker in enumerate(workers):
            parts = [mixing(step, index, part) for part in range(recipe.acc_times)]
            gradients.append(worker.gradient(*batches(step, index), parts, record.losses))
        if not recipe.local:
            gradients = [torch.stack(gradients).mean(dim=0)] * recipe.workers
        for worker, gradient in zip(workers, gradients, strict=True):
            record.rates.append(worker.lr)
            worker.update(gradient)
        done = step + 1
        local_steps += 1
        averaged = not recipe.local or local_steps >= h
        if recipe.local and averaged:
            _average(workers)
            local_steps = 0
        # the rate of the next step is there before H is decided by it
        for worker in workers:
            worker.set_lr(recipe.lr(done))
        if averaged:
            record.averaged_after.append(done)
            if done < recipe.total_steps:
                h = recipe.h(done, workers[0].lr)
    record.tensors = [tensors_of(worker.network, worker.optimizer) for worker in workers]
    return record


class _Worker:
    """One process: a network, its optimizer and nobody else's BatchNorm statistics."""

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        self.network = network.train()
        self._recipe = recipe
        self._parameters = list(network.parameters())
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                self._parameters,
                lr=recipe.max_lr,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov,
                weight_decay=recipe.wd,
                foreach=True,
            )
        else:
            self.optimizer = torch.optim.AdamW(
                self._parameters,
                lr=recipe.max_lr,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=recipe.wd,
                foreach=True,
            )
        self._criterion: Any = nn.CrossEntropyLoss()
        if recipe.label_smoothing > 0:
            self._criterion = LabelSmoothingCrossEntropy(  # type: ignore[no-untyped-call]
                smoothing=recipe.label_smoothing
            )

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        mixing: Sequence[tuple[float, Tensor]],
        losses: list[float],
    ) -> Tensor:
        """The flat gradient of a step's images. Each micro-batch begins with no gradients; what it
        leaves is added up elsewhere."""
        total = [torch.zeros_like(parameter) for parameter in self._parameters]
        image_parts = images.chunk(self._recipe.acc_times)
        label_parts = labels.chunk(self._recipe.acc_times)
        for x, y, (m, order) in zip(image_parts, label_parts, mixing, strict=True):
            self.optimizer.zero_grad()
            if self._recipe.strong_aug:
                output = self.network((1 - m) * x + m * x[order])
                loss = (1 - m) * self._criterion(output, y) + m * self._criterion(output, y[order])
            else:
                loss = self._criterion(self.network(x), y)
            losses.append(loss.item())
            (loss / self._recipe.acc_times).backward()
            for sum_, parameter in zip(total, self._parameters, strict=True):
                assert parameter.grad is not None
                sum_ += parameter.grad
        return torch.cat([sum_.flatten() for sum_ in total])

    def update(self, gradient: Tensor) -> None:
        """One optimizer step with this flat gradient in place of the worker's own."""
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, gradient.split(sizes), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.view_as(parameter))
        if not math.isinf(self._recipe.gradient_clipping):
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.gradient_clipping)
        self.optimizer.step()

    def averaged_tensors(self) -> list[Tensor]:
        """What takes part in an average: parameters, and moments if they are asked for."""
        asked = {"exp_avg": self._recipe.avg_m, "exp_avg_sq": self._recipe.avg_v}
        keys = [key for key, wanted in asked.items() if wanted]
        moments = [self.optimizer.state[p][key] for p in self._parameters for key in keys]
        return [*(parameter.detach() for parameter in self._parameters), *moments]


def _average(workers: Sequence[_Worker]) -> None:
    flat = [torch.cat([t.flatten() for t in worker.averaged_tensors()]) for worker in workers]
    mean = torch.stack(flat).mean(dim=0)
    for worker in workers:
        tensors = worker.averaged_tensors()
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
