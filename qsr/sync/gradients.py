"""Data parallel training: the average of the gradients in every step."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsr.sync.averaging import mean_
from qsr.sync.communicator import Communicator
from qsr.sync.flat import FlatModule


class GradientAverager:
    """Averages the gradients of all workers, of which `replicas` are this rank's.

    Where every rank is one worker this is torch's DDP, which hides the all-reduces, in buckets of
    `bucket_mib` MiB, behind the backward pass. Otherwise, or with None, gradients lie in flat
    buffers, are summed on the rank first where it holds several workers, and averaged after the
    backward pass.
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
                # deprecated by torch 2.15 for a name that older versions do not have
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                self._ddp = DistributedDataParallel(
                    replicas[0].module,
                    broadcast_buffers=False,  # each worker's BatchNorm statistics are its own
                    bucket_cap_mb=bucket_mib,
                    gradient_as_bucket_view=True,
                    static_graph=True,  # the same parameters, as often, in every step
                )
        elif topology.num_workers > 1:
            for replica in replicas:
                replica.flatten_gradients()

    def forward_of(self, replica: FlatModule) -> nn.Module:
        """What the replica's batches go through: DDP around its module, or the module itself."""
        return replica.module if self._ddp is None else self._ddp

    def settle(self, images: Tensor) -> None:
        """Collective: two backward passes whose gradients are thrown away, before the first step
        of a session.

        DDP records the graph in its first backward pass and reorders its buckets after it, and
        with them the order in which the ranks' gradients are added. Without this a resumed run
        would take more steps with the first order than an uninterrupted one, and differ in the
        last bits.
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
        """Whether DDP hides the communication, so that its time cannot be measured by itself."""
        return self._ddp is not None

    def backward_context(self, *, average: bool) -> AbstractContextManager[object]:
        """Context of a forward and backward pass; `average`: the last one of a data parallel
        step, after which the gradients are averaged."""
        if self._ddp is None:
            return nullcontext()
        return self._communicator.missing("an average") if average else self._ddp.no_sync()

    def finish(self) -> None:
        """Collective: after the last backward pass of a step, complete the average."""
        flat = [r.gradients.buffers for r in self._replicas if r.gradients is not None]
        if flat:
            mean_(self._communicator, flat)
