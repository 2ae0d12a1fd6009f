"""Flat buffers and averages, by value."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qsr.core.sampling import Sampler
from qsr.errors import DisagreementError
from qsr.sync.averaging import Averager, MomentBuffers
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers, FlatModule
from qsr.sync.topology import Topology

CPU = torch.device("cpu")


def communicator(workers: int) -> Communicator:
    return Communicator(Topology(0, 1, 0, workers), CPU, timeout_seconds=10.0)


def tensors(offset: float) -> list[torch.Tensor]:
    """Odd sizes, an empty one, a scalar, several dtypes and memory formats."""
    values = [
        torch.arange(7.0),
        torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.tensor(3.0),
        torch.empty(0),
        torch.arange(6, dtype=torch.float64).view(2, 3).t(),
        torch.arange(5, dtype=torch.bfloat16),
        torch.arange(8.0)[::2],
    ]
    return [value + offset for value in values]


def test_flat_buffers_keep_values_and_memory_formats() -> None:
    originals = tensors(0.0)
    flat = FlatBuffers(originals, extra=3)
    assert {dtype: len(buffer) for dtype, buffer in flat.buffers.items()} == {
        torch.float32: 16 + 160 + 16 + 4 + 3,  # 7, 150, 1 and 4, each from a whole 64 bytes on
        torch.float64: 6,
        torch.bfloat16: 5,
    }
    assert flat.bytes == 162 * 4 + 6 * 8 + 5 * 2
    for original, view in zip(originals, flat.views, strict=True):
        assert torch.equal(view, original)
        assert view.stride() == torch.empty_like(original).stride()
        assert view.untyped_storage().data_ptr() == flat.buffers[view.dtype].data_ptr()
        assert view.storage_offset() * view.element_size() % 64 == 0
    assert flat.views[1].is_contiguous(memory_format=torch.channels_last)
    assert len(flat.tail) == 3


def test_views_do_not_overlap() -> None:
    flat = FlatBuffers(tensors(0.0), extra=2)
    for number, view in enumerate(flat.views):
        view.fill_(number)
    flat.tail.fill_(99)
    assert [view.flatten().unique().tolist() for view in flat.views] == [
        [0], [1], [2], [], [4], [5], [6],
    ]  # fmt: skip


def test_average_over_virtual_workers() -> None:
    replicas = [FlatBuffers(tensors(offset)) for offset in (0.0, 1.0, 5.0)]
    Averager(communicator(3)).average_(replicas, None)
    for replica in replicas:
        for view, expected in zip(replica.views, tensors(2.0), strict=True):
            assert torch.equal(view, expected)


def test_training_goes_on_in_the_flat_buffer() -> None:
    model = FlatModule(nn.Linear(3, 2), extra=FINGERPRINT_SIZE)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=1.0)
    before = model.flat.buffers[torch.float32].clone()
    model.module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    change = model.flat.buffers[torch.float32] - before
    weights, bias = [-1.0] * 6 + [0.0] * 10, [-1.0] * 2
    assert change.tolist() == pytest.approx(weights + bias + [0.0] * FINGERPRINT_SIZE)


def test_tied_parameters_are_averaged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = FlatModule(Tied())
    assert len(model.flat.buffers[torch.float32]) == 4
    assert len(list(model.module.parameters())) == 1


SAMPLER = Sampler(96, 8, 2, seed=1)
MARK = Fingerprint(step=8, round=2, h=4, lr=0.1, sampler=SAMPLER, config="c0ffee")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (MARK._replace(step=9), "step"),
        (MARK._replace(round=3), "round"),
        (MARK._replace(h=5), "h"),
        (MARK._replace(lr=0.2), "lr"),
        (MARK._replace(sampler=replace(SAMPLER, seed=2)), "sampler"),
        (MARK._replace(config="decaf"), "config"),
        (MARK._replace(step=9, round=3), "step, round"),
    ],
)
def test_fingerprints_that_differ_are_an_error(other: Fingerprint, named: str) -> None:
    class Disagreeing(Communicator):
        """Adds what a second worker with another fingerprint would send."""

        def sum_(self, tensor: torch.Tensor) -> None:
            tensor += torch.cat([torch.ones(1), torch.tensor(other.encode())])

    averager = Averager(Disagreeing(Topology(0, 1, 0, 2), CPU, 10.0))
    buffers = FlatBuffers([torch.ones(1)], FINGERPRINT_SIZE)
    with pytest.raises(DisagreementError, match=f"disagree on {named} .here step=8, round=2, h=4"):
        averager.average_([buffers], MARK)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 100, 4096])
def test_equal_fingerprints_survive_the_arithmetic(workers: int) -> None:
    """Sum over many workers, then division: exact in float32, or every run would stop."""
    for step in range(50):
        own = torch.tensor(MARK._replace(step=step).encode())
        total = torch.zeros_like(own)
        for _ in range(workers):
            total += own
        assert torch.equal(total / workers, own)


def test_moments_are_averaged_in_place_on_request() -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in parameters]
    moments = MomentBuffers(optimizers, ["exp_avg", "exp_avg_sq"])
    for step in range(3):
        for worker, (parameter, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            parameter.grad = torch.tensor([1.0, 2.0, 4.0]) * (worker + 1 + step)
            optimizer.step()
        expected = {
            key: (optimizers[0].state[parameters[0]][key] + optimizers[1].state[parameters[1]][key])
            / 2
            for key in ("exp_avg", "exp_avg_sq")
        }
        Averager(communicator(2)).average_(moments.buffers(), None)
        for optimizer, parameter in zip(optimizers, parameters, strict=True):
            for key, value in expected.items():
                assert torch.equal(optimizer.state[parameter][key], value)
    assert MomentBuffers(optimizers, []).buffers() == []
