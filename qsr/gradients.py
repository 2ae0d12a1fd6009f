"""Data parallel training: the average of the gradients in every step."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qsr.averaging import mean_
from qsr.distributed import Communicator
from qsr.worker import Worker


class GradientAverager:
    """Averages the gradients of all workers.

    Where every rank is one worker this is torch's DDP, which hides the all-reduces, in buckets of
    `bucket_mib`, behind the backward pass. Otherwise, or with None, gradients lie in flat buffers,
    are summed on the rank first where it holds several workers, and averaged after the backward
    pass.
    """

    def __init__(
        self, workers: Sequence[Worker], communicator: Communicator, bucket_mib: float | None
    ) -> None:
        self._communicator = communicator
        self._workers = workers
        self._ddp: DistributedDataParallel | None = None
        topology = communicator.topology
        if bucket_mib is not None and topology.num_workers > 1 and len(workers) == 1:
            with warnings.catch_warnings():
                # deprecated by torch 2.15 for a name that older versions do not have
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                self._ddp = DistributedDataParallel(
                    workers[0].model.module,
                    broadcast_buffers=False,  # each worker's BatchNorm statistics are its own
                    bucket_cap_mb=bucket_mib,
                    gradient_as_bucket_view=True,
                    static_graph=True,  # the same parameters, as often, in every step
                )
            workers[0].forward = self._ddp
        elif topology.num_workers > 1:
            for worker in workers:
                worker.flatten_gradients()

    def settle(self, images: Tensor) -> None:
        """Collective: two backward passes for nothing, before the first step of a session.

        DDP records the graph in its first backward pass and orders its buckets anew after it, and
        with them the order in which the ranks' gradients are added. Without this a resumed run
        would take more steps with the first order than an uninterrupted one, and differ in the
        last bits.
        """
        if self._ddp is None:
            return
        (worker,) = self._workers
        before = [buffer.clone() for buffer in worker.model.module.buffers()]
        for _ in range(2):
            worker.forward(images).float().sum().backward()
            worker.zero_gradients()
        for buffer, value in zip(worker.model.module.buffers(), before, strict=True):
            buffer.copy_(value)

    @property
    def overlaps(self) -> bool:
        """Whether DDP hides the communication, so that its time cannot be told apart."""
        return self._ddp is not None

    def backward_context(self, *, average: bool) -> AbstractContextManager[object]:
        """Context of a forward and backward pass; `average`: the last one of a data parallel
        step, after which the gradients are averaged."""
        if self._ddp is None:
            return nullcontext()
        return self._communicator.missing("an average") if average else self._ddp.no_sync()

    def finish(self) -> None:
        """Collective: after the last backward pass of a step, complete the average."""
        replicas = [w.gradients.buffers for w in self._workers if w.gradients is not None]
        if replicas:
            mean_(self._communicator, replicas, self._communicator.topology.num_workers)
