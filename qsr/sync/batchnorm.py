"""BatchNorm statistics of an averaged model.

The running statistics that workers collect in training belong to their own parameters, not to the
average. So they are re-estimated before an evaluation: training batches pass through a copy of the
averaged model, and each layer's mean and variance are computed from its inputs, pooled over all
batches of all workers. The variance includes that between batches and between workers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qsr.sync.communicator import Communicator


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor], communicator: Communicator) -> None:
    """Collective: set the running statistics of `model` from `batches` of images on every rank.

    Each batch is normalised by its own statistics, as in training, and weighted by its number of
    values; a rank may have no batch. The variance is unbiased, as in torch. The model is left in
    evaluation mode.
    """
    layers = batchnorm_layers(model)
    if not layers:
        return
    device = communicator.device
    sums = [
        torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=device)
        for layer in layers
    ]

    def gather(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        channels = values.shape[1]
        variance, mean = torch.var_mean(
            values.transpose(0, 1).reshape(channels, -1), dim=1, correction=0
        )
        mean, variance = mean.double(), variance.double()
        count = values.numel() // channels
        total = sums[layers.index(layer)]  # type: ignore[arg-type]
        total[0] += count
        total[1 : 1 + channels] += count * mean
        total[1 + channels :] += count * (variance + mean * mean)

    model.train().eval()  # train() first: it drops tensors that some networks keep in evaluation
    hooks = []
    for layer in layers:
        layer.reset_running_stats()  # with the batch count, so nothing of an earlier pass is left
        layer.train()
        hooks.append(layer.register_forward_pre_hook(gather))
    for images in batches:
        model(images)
    for hook in hooks:
        hook.remove()

    pooled = communicator.total(torch.cat(sums))
    for layer, values in zip(layers, pooled.split([len(s) for s in sums]), strict=True):
        count, (mean, square) = values[0], values[1:].chunk(2)
        mean, square = mean / count, square / count
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean * mean).clamp_(min=0.0) * (count / (count - 1)))
    model.train().eval()
