"""Loading with NVIDIA DALI: C++ threads decode and transform, on the CPU or on the GPU."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from qsr.data.batch import Batch, Request, check_request
from qsr.data.crew import Crew
from qsr.data.dali_graph import Decode, eval_pipeline, train_pipeline
from qsr.data.datasets import ImageFolder, unreadable_files
from qsr.data.decoder import log_errors_only
from qsr.data.decoding import defect
from qsr.data.randaugment_torch import augment_batch
from qsr.data.resize import Resizer
from qsr.data.torchvision import Normalisation
from qsr.data.transforms import EvalTransform, TrainDraws, TrainTransform, draw
from qsr.errors import DataError


class DaliLoader:
    """A `Loader` that runs a DALI pipeline.

    Args:
        threads: CPU threads of the pipeline; at least one is used.
        prefetch: batches in flight while the caller uses the last one.
        decode: "gpu" decodes JPEGs on the GPU. Its pixels differ slightly from the CPU's, so this
            must not change in the middle of a run.

    Raises:
        DataError: `decode` is "gpu" without a CUDA device.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        transform: TrainTransform | EvalTransform,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
        decode: Decode = "cpu",
    ) -> None:
        if decode == "gpu" and device.type != "cuda":
            raise DataError(f"decode=gpu needs a CUDA device, not {device}: use decode=cpu")
        log_errors_only()
        self._dataset = dataset
        self._transform = transform
        self._batch_size = batch_size
        self._device = device
        self._threads = threads
        self._prefetch = prefetch
        self._decode = decode
        self._gpu = device.type == "cuda"
        self._labels = np.array(dataset.labels, dtype=np.int64)
        randaugment = getattr(transform, "randaugment", None)
        self._fill = randaugment.fill(transform.mean) if randaugment else (0, 0, 0)
        self._normalise = Normalisation(transform, device)
        self._crew = Crew(max(1, threads))
        self._resizer = None if self._gpu else Resizer(transform.size, self._crew, self._fill)
        self._pipeline = self._build(batch_size)
        self._in_work: deque[_InWork] = deque()  # in the order of the pipeline's outputs
        self._stream: object = None  # the newest stream; older ones stop

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader.batches`."""
        stream = self._stream = object()
        self._discard()
        for request in requests:
            self._schedule(request)
            if len(self._in_work) > self._prefetch:
                yield self._collect()
                if self._stream is not stream:
                    return
        while self._in_work:
            yield self._collect()
            if self._stream is not stream:
                return

    def close(self) -> None:
        """See `Loader.close`."""
        self._in_work.clear()
        self._pipeline = None  # its destructor stops the threads
        self._crew.close()

    def _build(self, batch_size: int) -> Any:
        build: Any = (
            train_pipeline if isinstance(self._transform, TrainTransform) else eval_pipeline
        )
        pipeline = build(
            self._transform,
            self._resizer,
            decode=self._decode,
            crew=self._crew,
            batch_size=batch_size,
            num_threads=max(1, self._threads),
            device_id=self._device_id(),
            # Runs are scheduled ahead by hand, because DALI's own queue cannot start with fewer
            # requests than its depth.
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _device_id(self) -> int | None:
        if not self._gpu:
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def _draw(self, request: Request) -> TrainDraws | None:
        if isinstance(self._transform, EvalTransform):
            return None
        return draw(self._transform, request.seed, len(request.indices))

    def _inputs(self, request: Request, draws: TrainDraws | None) -> dict[str, Any]:
        """The pipeline's inputs by name; each has one row per sample."""
        paths = [
            np.frombuffer(os.fsencode(self._dataset.path(index)), dtype=np.uint8)
            for index in request.indices
        ]
        inputs = {"paths": paths, "labels": self._labels[list(request.indices)]}
        if draws is not None:
            inputs |= {"windows": draws.windows, "flips": draws.flips}
            if draws.randaugment is not None and not self._gpu:
                inputs |= draws.randaugment._asdict()
        return inputs

    def _schedule(self, request: Request) -> None:
        if self._pipeline is None:
            raise RuntimeError("the loader is closed: create a new one")
        check_request(request, self._batch_size, len(self._dataset))
        draws = self._draw(request)
        _start(self._pipeline, self._inputs(request, draws))
        self._in_work.append(_InWork(request, draws))

    def _collect(self) -> Batch:
        """The oldest batch in flight."""
        # Outputs on torch's current stream need no host synchronisation. They need no copy either:
        # the dynamic executor gives each batch its own memory, and reuses it in stream order only
        # after the last tensor that refers to it is freed.
        stream = torch.cuda.current_stream(self._device) if self._gpu else None
        try:
            images, labels = self._pipeline.outputs(stream)
        except RuntimeError as error:
            explanation = self._explain(error)
            self.close()
            raise explanation from error
        draws = self._in_work.popleft().draws
        pixels = from_dlpack(images.as_tensor())
        if self._gpu and draws is not None and draws.randaugment is not None:
            augmented = augment_batch(pixels, draws.randaugment, self._fill)
            pixels = self._normalise(augmented.permute(0, 3, 1, 2))
        return Batch(pixels, from_dlpack(labels.as_tensor()))

    def _discard(self) -> None:
        """Drop the batches that an abandoned stream left in flight; their errors are ignored."""
        while self._in_work:
            self._in_work.popleft()
            try:
                self._pipeline.outputs()
            except RuntimeError:
                self._in_work.clear()
                self._pipeline = self._build(self._batch_size)

    def _explain(self, error: RuntimeError) -> DataError:
        """Find the failing file among the batches in flight: DALI seldom names it."""
        for request, _ in self._in_work:
            if reasons := self._unreadable(request):
                return unreadable_files(self._dataset, reasons)
        return DataError(
            f"DALI failed on a batch, although each of its files loads alone: {_reason(error)}"
        )

    def _unreadable(self, request: Request) -> dict[int, str]:
        """Run each sample alone with the same draws; return index -> reason for each failure. The
        reason is Pillow's if it rejects the file too."""
        inputs = self._inputs(request, self._draw(request))
        reasons = {}
        pipeline = self._build(1)
        for row, index in enumerate(request.indices):
            try:
                _start(pipeline, {name: rows[row : row + 1] for name, rows in inputs.items()})
                pipeline.outputs()
            except RuntimeError as error:
                reasons[index] = defect(self._dataset.path(index)) or _reason(error)
                pipeline = self._build(1)
        return reasons


class _InWork(NamedTuple):
    request: Request
    draws: TrainDraws | None
    """None for validation images."""


def _start(pipeline: Any, inputs: Mapping[str, Any]) -> None:
    for name, rows in inputs.items():
        pipeline.feed_input(name, rows)
    pipeline.schedule_run()


def _reason(error: RuntimeError) -> str:
    """The informative part of DALI's message, on one line."""
    message = str(error).partition("encountered:")[2] or str(error)
    for boilerplate in ("C++ context", "Current pipeline object"):
        message = message.partition(boilerplate)[0]
    return " ".join(message.split())
