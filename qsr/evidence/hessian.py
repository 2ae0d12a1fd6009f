"""The trace of the Hessian of the training loss: the sharpness of a run's final minimum."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsr.core.seeds import seed_for
from qsr.train.networks import evaluation_mode


class TraceEstimate(NamedTuple):
    """An unbiased estimate of a trace."""

    mean: float
    standard_error: float
    """Over the probes; it does not include differences between runs."""


def hessian_trace(
    module: nn.Module, images: Tensor, labels: Tensor, *, probes: int, seed: int
) -> TraceEstimate:
    """tr(H) of the mean cross entropy on all `images` [n, 3, size, size] and `labels` [n], for the
    trainable parameters of `module`.

    The module is put into evaluation mode (BatchNorm uses running statistics, no dropout); the loss
    has neither label smoothing nor mixup. Hutchinson's estimate: the mean of v'Hv over `probes`
    vectors v of independent random signs, drawn from `seed`. It is exact if H is diagonal. Raises
    ValueError for fewer than two probes.
    """
    if probes < 2:
        raise ValueError(f"a standard error needs at least two probes, got {probes}")
    evaluation_mode(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    # fused attention kernels cannot be differentiated twice
    with sdpa_kernel(SDPBackend.MATH):
        loss = functional.cross_entropy(module(images), labels)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(seed_for(seed, "hessian"))
    forms = torch.stack(
        [_quadratic_form(parameters, gradients, generator) for _ in range(probes)]
    ).double()
    return TraceEstimate(float(forms.mean()), float(forms.std() / probes**0.5))


def _quadratic_form(
    parameters: list[nn.Parameter], gradients: tuple[Tensor, ...], generator: torch.Generator
) -> Tensor:
    """v'Hv for one probe v; `gradients` must still have their graph."""
    signs = [
        torch.randint(2, p.shape, generator=generator).to(p).mul_(2).sub_(1) for p in parameters
    ]
    products = torch.autograd.grad(
        gradients, parameters, signs, retain_graph=True, materialize_grads=True
    )
    terms = [(v * hv).sum() for v, hv in zip(signs, products, strict=True)]
    return torch.stack(terms).sum()
