"""Averages over the workers, in place on their flat buffers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers


class Averager:
    """Averages flat buffers over all workers.

    `replicas` are the buffers of this rank's workers. All have the same layout, and the tail of the
    float32 buffer has space for a fingerprint.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._num_workers = communicator.topology.num_workers
        self._disagreement = torch.zeros(FINGERPRINT_SIZE, device=communicator.device)
        self._last: Fingerprint | None = None

    def average_(self, replicas: Sequence[FlatBuffers], fingerprint: Fingerprint | None) -> None:
        """Collective: replace every replica, in place, by the mean over all workers.

        The fingerprint (None for buffers without space for it) is part of the same all-reduce. On
        the CPU, ranks that disagree raise DisagreementError here; on a GPU only at the next
        `check`, because reading the result here would make the host wait.
        """
        own = self._sign_(replicas, fingerprint)
        mean_(self._communicator, [replica.buffers for replica in replicas])
        self._compare(replicas[0], own, fingerprint)

    def begin(
        self, replicas: Sequence[FlatBuffers], fingerprint: Fingerprint, into: FlatBuffers
    ) -> "PendingAverage":
        """Collective: like `average_`, but write the mean only to `into`, without waiting for it.
        The replicas must not be changed before the average is complete."""
        own = self._sign_(replicas, fingerprint)
        first, *others = (replica.buffers for replica in replicas)
        sums = []
        for dtype, buffer in into.buffers.items():
            buffer.copy_(first[dtype])
            for other in others:
                buffer.add_(other[dtype])
            sums.append(self._communicator.begin_sum_(buffer))

        def finish() -> None:
            for pending in sums:
                pending.wait().div_(self._num_workers)
            self._compare(into, own, fingerprint)

        return PendingAverage(finish)

    def _sign_(
        self, replicas: Sequence[FlatBuffers], fingerprint: Fingerprint | None
    ) -> Tensor | None:
        """Write the fingerprint to the replicas' tails and return it as a tensor."""
        if fingerprint is None:
            return None
        own = torch.tensor(fingerprint.encode())
        for replica in replicas:
            replica.tail.copy_(own, non_blocking=True)
        return own

    def _compare(
        self, averaged: FlatBuffers, own: Tensor | None, fingerprint: Fingerprint | None
    ) -> None:
        if own is None:
            return
        expected = own.to(self._disagreement.device, non_blocking=True)
        self._disagreement += averaged.tail != expected
        self._last = fingerprint
        if not self._disagreement.is_cuda:
            self.check()

    def check(self) -> None:
        """Raise DisagreementError if any average so far mixed different fingerprints.

        Waits for the device.
        """
        if self._last is None or not self._disagreement.any():
            return
        rank = self._communicator.topology.rank
        raise self._last.disagreement(rank, self._disagreement.tolist())


class PendingAverage(NamedTuple):
    """An average in progress."""

    wait: Callable[[], None]
    """Collective: wait for the average. Raises DisagreementError like `Averager.average_`."""


def mean_(communicator: Communicator, replicas: Sequence[dict[torch.dtype, Tensor]]) -> None:
    """Collective: mean over all workers, in place: a local sum, one all-reduce, one division."""
    first, *others = replicas
    for dtype, buffer in first.items():
        for other in others:
            buffer.add_(other[dtype])
        communicator.sum_(buffer)
        buffer.div_(communicator.topology.num_workers)
        for other in others:
            other[dtype].copy_(buffer)


def mean_tensors_(
    communicator: Communicator, tensors: Iterable[Tensor], bucket_bytes: int = 25 * 2**20
) -> None:
    """Collective: replace each tensor, in place, by its mean over all workers. For tensors that lie
    in no common buffer: they are packed into buckets, which need `bucket_bytes` of memory; a larger
    tensor is a bucket of its own."""
    for bucket in _buckets(tensors, bucket_bytes):
        packed = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        communicator.sum_(packed)
        packed.div_(communicator.topology.num_workers)
        for tensor, mean in zip(bucket, packed.split([t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(mean.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, in order, as many as fit."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = waiting.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > bucket_bytes:
            yield bucket.copy()
            bucket.clear()
        bucket.append(tensor)
    yield from waiting.values()


class MomentBuffers:
    """The optimizer states of the given names in flat buffers, one for each worker of the rank.

    Optimizers create their states in the first step, so the states are moved into the buffers when
    these are first used. A parameter without a state counts as zeros.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], keys: Sequence[str]) -> None:
        self._optimizers = optimizers
        self._keys = keys
        self._flat: list[FlatBuffers] = []

    def buffers(self) -> Sequence[FlatBuffers]:
        """The flat buffers; from now on the optimizers update their states there, in place."""
        if self._keys and not self._flat:
            self._flat = [self._flatten(optimizer) for optimizer in self._optimizers]
        return self._flat

    def _flatten(self, optimizer: torch.optim.Optimizer) -> FlatBuffers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        slots = [(optimizer.state[p], key, p) for key in self._keys for p in parameters]
        tensors = [s[k] if s.get(k) is not None else torch.zeros_like(p) for s, k, p in slots]
        flat = FlatBuffers(tensors)
        for (state, key, _), view in zip(slots, flat.views, strict=True):
            if state.get(key) is not None:
                state[key] = view
        return flat
