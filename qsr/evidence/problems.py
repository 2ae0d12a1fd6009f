"""Small problems that show the effect of local steps on generalization, as tensor programs over
many replicas at once.

A replica is one copy of the parameters. Parameters have leading dimensions [seeds, workers], and
functions here treat every replica independently. All losses are half a squared error, and workers
see targets with new noise in every step ("label noise"), as in the theory (Gu et al. 2023).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from qsr.core.seeds import seed_for

Parameters = Sequence[Tensor]
"""Each [seeds, workers, ...], or [seeds, ...] where a function says so."""


class Problem(Protocol):
    """The interface of a problem; data or initial weights differ for each seed."""

    train_size: int
    """Training samples."""
    outputs: int
    """Outputs of the model; each has its own label noise."""

    def start(self) -> list[Tensor]:
        """Initial parameters of every worker, [seeds, ...] each."""

    def losses(self, parameters: Parameters, samples: Tensor, noise: Tensor) -> Tensor:
        """Mean loss [seeds, workers] of each replica on training `samples` [seeds, workers, batch]
        (indices), with `noise` [seeds, workers, batch, outputs] on the targets."""

    def measure(self, parameters: Parameters) -> dict[str, Tensor]:
        """Measurements of models [seeds, ...], each [seeds]. Always `train_loss` without noise,
        `test_error`, and `hessian_trace`, the exact trace for the training loss without noise. If
        a part of the test images is for choices only, `tuning_error` is of these, and `test_error`
        of the others."""


class DigitsMlp:
    """A two-layer network on handwritten digits, in one split for all seeds.

    Inputs are the leading whitened principal components of all images, scaled to a mean norm of 1,
    and a constant; targets are one-hot. Each seed's network starts from random weights that were
    trained by noise-free full-batch gradient descent until they fit all training samples. So runs
    differ only in which of the many perfect fits label noise leads to. Needs scikit-learn.
    """

    outputs = 10
    COMPONENTS = 20
    BIAS = 0.3
    HIDDEN = 40
    START_STEPS, START_LR = 3000, 0.2

    def __init__(
        self,
        seeds: Sequence[int],
        train_size: int,
        split_seed: int,
        activation: Literal["tanh", "relu"] = "tanh",
        tuning_images: int = 0,
    ) -> None:
        from sklearn.datasets import load_digits
        from sklearn.decomposition import PCA

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=_generator(split_seed, "split")).numpy()
        # whitened with all images, which uses no labels: 80 images are too few for 20 components
        reduction = PCA(self.COMPONENTS, whiten=True, svd_solver="full")
        inputs = torch.from_numpy(reduction.fit_transform(images)[order]).float()
        inputs /= inputs.norm(dim=1).mean()
        inputs = torch.cat([inputs, torch.full((len(inputs), 1), self.BIAS)], dim=1)
        targets = torch.from_numpy(labels[order]).long()
        self.train_size = train_size
        self._inputs, self._labels = inputs[:train_size], targets[:train_size]
        self._test_inputs, self._test_labels = inputs[train_size:], targets[train_size:]
        self._tuning_images = tuning_images
        self._targets = torch.nn.functional.one_hot(self._labels, self.outputs).float()
        self._seeds = seeds
        self._activation = torch.tanh if activation == "tanh" else torch.relu

    @cached_property
    def _start(self) -> list[Tensor]:
        shapes = ((self.HIDDEN, self.COMPONENTS + 1), (self.outputs, self.HIDDEN))
        scales = (1.0, 1 / math.sqrt(self.HIDDEN))
        weights = [
            torch.stack(
                [torch.randn(shape, generator=_generator(seed, name)) for seed in self._seeds]
            )
            * scale
            for shape, scale, name in zip(shapes, scales, ("first", "second"), strict=True)
        ]
        weights = [weight.requires_grad_() for weight in weights]
        for _ in range(self.START_STEPS):
            loss = _half_square(self._forward(weights, self._inputs) - self._targets).sum()
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= self.START_LR * gradient
        return [weight.detach() for weight in weights]

    def start(self) -> list[Tensor]:
        return [weight.clone() for weight in self._start]

    def losses(self, parameters: Parameters, samples: Tensor, noise: Tensor) -> Tensor:
        outputs = self._forward(parameters, self._inputs[samples])
        return _half_square(outputs - self._targets[samples] - noise)

    def measure(self, parameters: Parameters) -> dict[str, Tensor]:
        outputs = self._forward(parameters, self._inputs)
        wrong = self._forward(parameters, self._test_inputs).argmax(-1) != self._test_labels
        tuning, test = wrong[:, : self._tuning_images], wrong[:, self._tuning_images :]
        train = outputs.argmax(-1) != self._labels
        return {
            "test_error": 100 * test.float().mean(-1),
            **({"tuning_error": 100 * tuning.float().mean(-1)} if self._tuning_images else {}),
            "train_error": 100 * train.float().mean(-1),
            "train_loss": _half_square(outputs - self._targets),
            "hessian_trace": self._hessian_trace(parameters),
        }

    def _forward(self, weights: Parameters, inputs: Tensor) -> Tensor:
        first, second = weights
        return self._activation(inputs @ first.mT) @ second.mT

    def _hessian_trace(self, weights: Parameters) -> Tensor:
        """The loss is sum_o r_o^2 / 2 with r = W2 h - y, h = h(z), z = W1 x. Its second derivative
        with respect to W2[o, j] is h_j^2, and with respect to W1[j, k] it is
        x_k^2 (sum_o W2[o, j]^2 h'_j^2 + sum_o r_o W2[o, j] h''_j)."""
        first, second = weights
        hidden = self._activation(self._inputs @ first.mT)  # [seeds, samples, hidden]
        residuals = hidden @ second.mT - self._targets
        if self._activation is torch.tanh:
            slope = 1 - hidden.square()
            curvature = -2 * hidden * slope
        else:
            slope, curvature = (hidden > 0).float(), torch.zeros_like(hidden)
        by_hidden = slope.square() * second.square().sum(-2, keepdim=True)
        by_hidden = by_hidden + curvature * (residuals @ second)
        by_first = self._inputs.square().sum(-1) * by_hidden.sum(-1)
        by_second = self.outputs * hidden.square().sum(-1)
        return (by_first + by_second).mean(-1)


class DiagonalNetwork:
    """A diagonal linear network f(x) = <u * u - v * v, x> with a sparse true weight vector: a
    regression with more weights than samples, in which flat solutions are sparse. Every seed has
    its own Gaussian inputs and random start."""

    outputs = 1
    START = math.sqrt(0.75)
    """u and v start uniform in [0, START), independently: if they start equal, the trace of the
    Hessian falls but the test error does not."""

    def __init__(
        self, seeds: Sequence[int], train_size: int, weights: int, truth: Sequence[float]
    ) -> None:
        self.train_size = train_size
        shape = (train_size, weights)
        self._inputs = torch.stack(
            [torch.randn(shape, generator=_generator(seed, "inputs")) for seed in seeds]
        )
        self._truth = torch.zeros(weights)
        self._truth[: len(truth)] = torch.tensor(truth)
        self._targets = self._inputs @ self._truth  # [seeds, samples]
        self._seeds = seeds
        self._rows = torch.arange(len(seeds)).view(-1, 1, 1)

    def start(self) -> list[Tensor]:
        size = len(self._truth)
        return [
            torch.stack([torch.rand(size, generator=_generator(s, name)) for s in self._seeds])
            * self.START
            for name in ("u", "v")
        ]

    def losses(self, parameters: Parameters, samples: Tensor, noise: Tensor) -> Tensor:
        u, v = parameters
        inputs, targets = self._inputs[self._rows, samples], self._targets[self._rows, samples]
        outputs = (inputs @ (u.square() - v.square()).unsqueeze(-1)).squeeze(-1)
        return (outputs - targets - noise.squeeze(-1)).square().mean(-1) / 2

    def measure(self, parameters: Parameters) -> dict[str, Tensor]:
        u, v = parameters
        weights = u.square() - v.square()
        outputs = (self._inputs @ weights.unsqueeze(-1)).squeeze(-1)
        # for Gaussian inputs: E <w - w*, x>^2
        test = (weights - self._truth).square().sum(-1)
        # the terms r_i (u_j^2 - v_j^2)'' x_ij for u_j and v_j cancel
        by_weight = 4 * self._inputs.square().mean(1) * (u.square() + v.square())
        return {
            "test_error": test,
            "train_loss": (outputs - self._targets).square().mean(-1) / 2,
            "hessian_trace": by_weight.sum(-1),
        }


def _half_square(errors: Tensor) -> Tensor:
    """[..., samples, outputs] -> [...]"""
    return errors.square().sum(-1).mean(-1) / 2


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(seed, f"problem {name}"))
