"""Re-estimated statistics against those of the pooled inputs."""

import torch
from torch import Tensor, nn

from qsr.sync.batchnorm import batchnorm_layers, reestimate
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from tests.support import batchnorm_net

ALONE = Communicator(Topology(0, 1, 0, 1), torch.device("cpu"), 10.0)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # other means and sizes a batch: the variance between them counts
    return [torch.randn(n, 3, 6, 6, generator=generator) * n + n for n in (2, 5, 9)]


def test_first_layer_has_the_statistics_of_all_images_pooled() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    reestimate(net, batches(), ALONE)
    pooled = torch.cat(batches())
    first = net[0]
    assert isinstance(first, nn.BatchNorm2d)
    torch.testing.assert_close(first.running_mean, pooled.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(first.running_var, pooled.var(dim=(0, 2, 3), correction=1))


def test_deeper_layer_sees_inputs_normalised_by_each_batch() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    reestimate(net, batches(), ALONE)
    with torch.no_grad():
        inputs = [
            net[2](torch.relu(nn.functional.batch_norm(x, None, None, training=True)))
            for x in batches()
        ]
    pooled = torch.cat(inputs)
    last = net[3]
    assert isinstance(last, nn.BatchNorm2d)
    torch.testing.assert_close(last.running_mean, pooled.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(last.running_var, pooled.var(dim=(0, 2, 3), correction=1))


def test_large_means_do_not_cancel() -> None:
    net = nn.Sequential(nn.BatchNorm1d(1))
    data = torch.tensor([[1000.0], [1001.0], [1002.0], [1003.0]])
    reestimate(net, [data[:2], data[2:]], ALONE)
    layer = net[0]
    assert isinstance(layer, nn.BatchNorm1d)
    assert layer.running_var is not None
    assert abs(layer.running_var.item() - 5 / 3) < 1e-6


def test_nothing_of_an_earlier_pass_stays() -> None:
    """Not even the count of batches: a run that resumes evaluates less often, and must end with
    the same model."""
    once, twice = batchnorm_net(), batchnorm_net()
    twice.load_state_dict(once.state_dict())
    reestimate(twice, [batch + 3.0 for batch in batches()], ALONE)
    for net in (once, twice):
        reestimate(net, batches(), ALONE)
    for ours, theirs in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_leaves_the_model_in_evaluation_mode_with_dropout_off() -> None:
    net = batchnorm_net()
    layer = batchnorm_layers(net)[0]
    layer.momentum = 0.25
    reestimate(net, batches(), ALONE)
    assert not any(module.training for module in net.modules())
    assert layer.momentum == 0.25
    assert len(layer._forward_pre_hooks) == 0
