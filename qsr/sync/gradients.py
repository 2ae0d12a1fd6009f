"""Data parallel training: averages of the gradients in every step."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsr.sync.averaging import mean_
from qsr.sync.communicator import Communicator
from qsr.sync.flat import FlatModule


class GradientAverager:
    """Averages the gradients of all workers of the communicator, or of all ranks of a worker;
    `replicas` are those of this rank.

    With one replica per rank this is torch's DDP, which overlaps the all-reduces, in buckets of
    `bucket_mib` MiB, with the backward pass. With several replicas per rank, or if `bucket_mib` is
    None, gradients are kept in flat buffers, summed on the rank, and averaged after the backward
    pass.
    """

    def __init__(
        self, replicas: Sequence[FlatModule], communicator: Communicator, bucket_mib: float | None
    ) -> None:
        self._communicator = communicator
        self._replicas = replicas
        self._ddp: DistributedDataParallel | None = None
        topology = communicator.topology
        if bucket_mib is not None and topology.num_workers > 1 and len(replicas) == 1:
            with warnings.catch_warnings():
                # torch 2.15 deprecates it for a name that older versions do not have
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                self._ddp = DistributedDataParallel(
                    replicas[0].module,
                    process_group=communicator.group,
                    broadcast_buffers=False,  # each worker's BatchNorm statistics are its own
                    bucket_cap_mb=bucket_mib,
                    gradient_as_bucket_view=True,
                    static_graph=True,  # every step uses the same parameters equally often
                )
        elif topology.num_workers > 1:
            for replica in replicas:
                replica.flatten_gradients()

    def forward_of(self, replica: FlatModule) -> nn.Module:
        """The module for the replica's forward passes: DDP around its module, or that module."""
        return replica.module if self._ddp is None else self._ddp

    def settle(self, images: Tensor) -> None:
        """Collective: two backward passes before the first step of a session; their gradients are
        discarded.

        DDP records the graph in its first backward pass and then reorders its buckets, which
        changes the order in which the ranks' gradients are added. Without this a resumed run would
        take more steps with the initial order than an uninterrupted one, and differ in the last
        bits.
        """
        if self._ddp is None:
            return
        (replica,) = self._replicas
        before = [buffer.clone() for buffer in replica.module.buffers()]
        for _ in range(2):
            self._ddp(images).float().sum().backward()
            replica.zero_gradients()
        for buffer, value in zip(replica.module.buffers(), before, strict=True):
            buffer.copy_(value)

    @property
    def overlaps(self) -> bool:
        """Whether DDP overlaps communication and computing, so that they cannot be timed apart."""
        return self._ddp is not None

    def backward_context(self, *, average: bool) -> AbstractContextManager[object]:
        """Context for a forward and backward pass; `average`: the gradients are averaged after it,
        because it is the last one of a data parallel step."""
        if self._ddp is None:
            return nullcontext()
        return self._communicator.missing("an average") if average else self._ddp.no_sync()

    def finish(self) -> None:
        """Collective: after the last backward pass of a step, complete the average."""
        flat = [r.gradients.buffers for r in self._replicas if r.gradients is not None]
        if flat:
            mean_(self._communicator, flat)
