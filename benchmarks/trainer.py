"""The trainer beside the barest correct loop of PyTorch: what does a step cost beyond arithmetic?

    python scripts/bench.py trainer

Both train the same network by the same optimizer on batches that already lie in memory; the trainer
with its plan, averages of a single worker, fingerprints, counts and a log every 20 steps. The first
20 steps count for neither: memory is found and kernels are chosen in them. A step of one linear
layer, which has next to no arithmetic, shows what the trainer's own work takes; a small step and a
large one, whether anything comes to it where there is arithmetic. The difference in milliseconds is
of the same pair of runs.
"""

import ctypes
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, ratio, record, summary
from qsr import CosineSchedule, Plan, QuadraticRule
from qsr.averaging import FINGERPRINT_SIZE, MomentBuffers
from qsr.checkpoint import Checkpointer
from qsr.config.schema import AdamWConfig, LossConfig, ModelConfig
from qsr.core.sampling import Sampler
from qsr.data import Batch, Request
from qsr.distributed import Communicator, Topology
from qsr.evaluation import BatchNormSource, Evaluator
from qsr.flat import FlatModule
from qsr.losses import TrainingLoss
from qsr.models import build_model
from qsr.optim import build_optimizer
from qsr.precision import Precision
from qsr.stopping import StopFlag
from qsr.tracking import JsonlTracker
from qsr.trainer import Due, Trainer
from qsr.worker import Worker

CPU = torch.device("cpu")
ADAMW = AdamWConfig("adamw", 0.9, 0.999, 1e-8, 0.05, None)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step's size."""

    model: Literal["linear", "small_resnet", "small_vit"]
    image_size: int
    batch: int
    steps: int


WARMUP = 20
"""Steps that do not count, and steps from log to log."""

CASES = {
    "next to no arithmetic": Case("linear", 8, 8, 2020),
    "small step": Case("small_resnet", 32, 8, 120),
    "large step": Case("small_vit", 32, 24, 60),
}


def network(case: Case) -> nn.Module:
    """With the same weights every time."""
    torch.manual_seed(0)
    if case.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * case.image_size**2, 10))
    settings = ModelConfig(case.model, None, channels_last=False)
    return build_model(settings, 10, case.image_size)


class MemoryLoader:
    """A few batches again and again."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        size = (case.batch, 3, case.image_size, case.image_size)
        self.batches_there = [
            Batch(
                torch.randn(size, generator=generator),
                torch.randint(10, (case.batch,), generator=generator),
            )
            for _ in range(4)
        ]

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for number, _ in enumerate(requests):
            yield self.batches_there[number % 4]

    def close(self) -> None:
        """Nothing to close."""


def bare_loop(case: Case) -> float:
    """Seconds for each step."""
    model, loader = network(case), MemoryLoader(case)
    optimizer = build_optimizer(ADAMW, model.parameters(), fused=False)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    schedule = CosineSchedule(1e-3, 1e-6, 10, case.steps)

    def train_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        images, labels = loader.batches_there[step % 4]
        # before the forward pass, as PyTorch's own loops do: their memory serves activations then
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()

    for step in range(WARMUP):
        train_step(step)
    started = time.perf_counter()
    for step in range(WARMUP, case.steps):
        train_step(step)
    return (time.perf_counter() - started) / (case.steps - WARMUP)


def with_the_trainer(case: Case) -> float:
    """Seconds for each step."""
    communicator = Communicator(Topology(0, 1, 0, 1), CPU, timeout_seconds=60.0)
    precision = Precision("fp32", CPU)
    sampler = Sampler(case.batch * case.steps, case.batch, 1, seed=1)
    flat = FlatModule(network(case), FINGERPRINT_SIZE)
    optimizer = build_optimizer(ADAMW, flat.module.parameters(), fused=False)
    worker = Worker(0, flat, optimizer, precision.scaler())
    # the session ends before the plan does: at its end there would be an evaluation
    schedule = CosineSchedule(1e-3, 1e-6, 10, case.steps + 100)
    batchnorm = BatchNormSource(MemoryLoader(case), sampler, case.batch, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracker = JsonlTracker(folder / "metrics.jsonl")
        trainer = Trainer(
            plan=Plan(schedule, QuadraticRule(h_base=4, alpha=1e-3)),
            sampler=Sampler(case.batch * (case.steps + 100), case.batch, 1, seed=1),
            workers=[worker],
            moments=MomentBuffers([optimizer], []),
            loader=MemoryLoader(case),
            loss=TrainingLoss(LossConfig(label_smoothing=0.1, mixup_alpha=0.0)),
            micro_batch=case.batch,
            clip_norm=None,
            precision=precision,
            communicator=communicator,
            evaluator=Evaluator(
                network(case), MemoryLoader(case), case.batch, case.batch, batchnorm, communicator,
                precision,
            ),
            checkpointer=Checkpointer(folder / "checkpoints", 1, communicator),
            tracker=tracker,
            due=Due(WARMUP, 10**9, None, case.steps),
            config_hash="0123456789abcdef",
            stop=StopFlag(),
            bucket_mib=25.0,
            delay_steps=0,
        )  # fmt: skip
        trainer.train()
        tracker.close()
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == WARMUP
    seconds: float = trainer.progress.train_seconds - first["train_seconds"]
    return seconds / (case.steps - WARMUP)


def measure(case: Case) -> dict[str, Any]:
    """The two in turn."""
    bare, ours = "bare loop", "trainer"
    seconds = alternate(
        {bare: partial(bare_loop, case), ours: partial(with_the_trainer, case)}, repetitions=11
    )
    overhead = [t - b for t, b in zip(seconds[ours], seconds[bare], strict=True)]
    return {
        "case": dataclasses.asdict(case),
        "seconds_per_step": {name: summary(values) for name, values in seconds.items()},
        "ratio": ratio(seconds[ours], seconds[bare]),
        "overhead_seconds": summary(overhead),
    }


def keep_memory() -> None:
    """Have the C library keep the memory that was freed. By default it gives large pieces back, and
    whether a tensor then costs new pages depends on what was freed before it: several per cent of a
    step that no trainer is to blame for. glibc only; elsewhere nothing changes."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


def main() -> int:
    torch.set_num_threads(1)
    keep_memory()
    results = {name: measure(case) for name, case in CASES.items()}
    for name, found in results.items():
        bare, ours = (1e3 * about["median"] for about in found["seconds_per_step"].values())
        print(
            f"{name}: bare loop {bare:.2f} ms, trainer {ours:.2f} ms a step, "
            f"{1e3 * found['overhead_seconds']['median']:+.3f} ms, "
            f"{found['ratio']['median']:.3f} x"
        )
    print(record("trainer", {"cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
