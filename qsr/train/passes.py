"""The forward and backward pass of one micro-batch: kernel by kernel, or as one CUDA graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qsr.train.losses import Mixing, TrainingLoss
from qsr.train.precision import Precision
from qsr.train.worker import Worker

_WARM_UP = 3
"""Passes before a capture, as many as torch's own helper makes: they compile, choose algorithms and
allocate workspaces, which a capture must not do."""


class Passes(Protocol):
    """Makes the passes of a rank's workers."""

    def step(self) -> AbstractContextManager[object]:
        """Context for all passes of one worker in one step."""

    def __call__(
        self, worker: Worker, forward: nn.Module, images: Tensor, labels: Tensor, seed: int, of: int
    ) -> Tensor:
        """Add the gradient of a micro-batch's loss, times the loss scale and divided by `of`, the
        micro-batches of the step, to the worker's gradients. Returns the loss, without graph.

        `forward` is the module for the forward pass, and `seed` is for mixup.
        """


class EagerPasses:
    """Launches every kernel from the host."""

    def __init__(self, loss: TrainingLoss, precision: Precision) -> None:
        self._loss = loss
        self._precision = precision

    def step(self) -> AbstractContextManager[object]:
        return self._precision.casts_kept()

    def __call__(
        self, worker: Worker, forward: nn.Module, images: Tensor, labels: Tensor, seed: int, of: int
    ) -> Tensor:
        with self._precision.autocast():
            loss = self._loss(forward, images, labels, seed)
        worker.scaler.scale(loss / of).backward()
        return loss.detach()


class _Inputs(NamedTuple):
    """Where the graphs read a micro-batch from."""

    images: Tensor
    labels: Tensor
    mixing: Mixing | None

    @staticmethod
    def like(images: Tensor, labels: Tensor, mixing: Mixing | None) -> "_Inputs":
        copies = None if mixing is None else Mixing(*(torch.empty_like(part) for part in mixing))
        return _Inputs(torch.empty_like(images), torch.empty_like(labels), copies)

    def fill(self, images: Tensor, labels: Tensor, mixing: Mixing | None) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.mixing is not None and mixing is not None:
            for target, value in zip(self.mixing, mixing, strict=True):
                target.copy_(value)


class _Graph(NamedTuple):
    """A captured pass of one worker."""

    graph: torch.cuda.CUDAGraph
    loss: Tensor
    """Overwritten by every replay."""


class GraphedPasses:
    """Captures each worker's first pass on a GPU, and launches all of them as one CUDA graph.

    What differs between passes stands in tensors that the graph reads: the micro-batch, mixup's
    draw, the loss scale. Dropout is not frozen: a capture registers the device's default generator,
    whose seed and offset each replay reads anew. All graphs of a rank share one memory pool, for
    they run one after another. Gradients are kept in flat buffers, because their addresses are part
    of a graph.

    A network that cannot be captured makes eager passes; `warn` gets one line that says so.
    """

    def __init__(
        self, loss: TrainingLoss, precision: Precision, warn: Callable[[str], None]
    ) -> None:
        self._loss = loss
        self._precision = precision
        self._warn = warn
        self._eager: EagerPasses | None = None
        self._stream = torch.cuda.Stream(precision.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: _Inputs | None = None
        self._graphs: dict[Worker, _Graph] = {}

    def step(self) -> AbstractContextManager[object]:
        # each replay casts the weights by itself; a cast kept from a capture would be frozen
        return nullcontext() if self._eager is None else self._eager.step()

    def __call__(
        self, worker: Worker, forward: nn.Module, images: Tensor, labels: Tensor, seed: int, of: int
    ) -> Tensor:
        if self._eager is None and worker not in self._graphs:
            self._prepare(worker, forward, images, labels, seed, of)
        if self._eager is not None:
            return self._eager(worker, forward, images, labels, seed, of)
        self._fill(images, labels, seed)
        graph, loss = self._graphs[worker]
        graph.replay()
        return loss.clone()

    def _prepare(
        self, worker: Worker, forward: nn.Module, images: Tensor, labels: Tensor, seed: int, of: int
    ) -> None:
        """Capture the worker's pass, or find that it cannot be."""
        if forward is not worker.model.module:
            reason: str | None = "gradients are averaged during it, so use overlap_gradients=false"
        else:
            worker.model.flatten_gradients()
            self._fill(images, labels, seed)
            reason = self._warm_up(worker, of)
        if reason is None:
            self._graphs[worker] = self._capture(worker, of)
            return
        self._warn(f"note: without CUDA graphs: the pass cannot be captured: {reason}")
        self._graphs.clear()
        self._eager = EagerPasses(self._loss, self._precision)

    def _fill(self, images: Tensor, labels: Tensor, seed: int) -> None:
        mixing = self._loss.draw(images, seed)
        if self._inputs is None:
            self._inputs = _Inputs.like(images, labels, mixing)
        self._inputs.fill(images, labels, mixing)

    def _run(self, worker: Worker, of: int) -> Tensor:
        assert self._inputs is not None  # filled before
        with self._precision.autocast():
            loss = self._loss.of(worker.model.module, *self._inputs)
        worker.scaler.scale(loss / of).backward()
        return loss.detach()

    def _warm_up(self, worker: Worker, of: int) -> str | None:
        """Passes of which nothing remains. Returns why they cannot be captured, if so: a failed
        capture would leave the device's generator unusable."""
        device, model = self._precision.device, worker.model
        buffers = [buffer.clone() for buffer in model.module.buffers()]
        drawn, drawn_on_host = torch.cuda.get_rng_state(device), torch.get_rng_state()
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP - 1):
                self._run(worker, of)
            reason = self._waits(worker, of)
        current.wait_stream(self._stream)
        if not torch.equal(drawn_on_host, torch.get_rng_state()):
            reason = "it draws random numbers on the host"
        torch.cuda.set_rng_state(drawn, device)
        torch.set_rng_state(drawn_on_host)
        for buffer, value in zip(model.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        model.zero_gradients()
        return reason

    def _waits(self, worker: Worker, of: int) -> str | None:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run(worker, of)
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            return "the host waits for the device in it"
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return None

    def _capture(self, worker: Worker, of: int) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        # other threads, as the loader's and NCCL's, may use the device meanwhile
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            loss = self._run(worker, of)
        return _Graph(graph, loss)


def make_passes(
    loss: TrainingLoss, precision: Precision, warn: Callable[[str], None], *, graphs: bool
) -> Passes:
    """`graphs`: as CUDA graphs, for which the device must be a GPU."""
    return GraphedPasses(loss, precision, warn) if graphs else EagerPasses(loss, precision)
