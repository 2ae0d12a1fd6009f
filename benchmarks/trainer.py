"""The trainer compared with a minimal PyTorch loop: what is the overhead per step?

    python scripts/bench.py trainer

Both train the same network with the same optimizer on batches in memory; the trainer with its plan,
averages of a single worker, fingerprints, counters and a log every 20 steps. They alternate every
20 steps in one process (the minimal loop runs when the trainer asks for the next batch), so that
temporary slowdowns of the machine affect both. The first 20 steps are not counted, because memory
is allocated and kernels are selected in them. Everything is repeated with new networks, because the
location of tensors in memory affects the time of a step slightly. A single linear layer, with
almost no arithmetic, shows the trainer's own cost; a small and a large step show whether it grows
with the arithmetic.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.measure import ratio, record, summary
from qsr import CosineSchedule, Plan, QuadraticRule
from qsr.cluster.memory import keep_freed_memory
from qsr.config.schema import AdamWConfig, EmaConfig, LossConfig, ModelConfig
from qsr.core.sampling import Sampler
from qsr.data import Batch, Request
from qsr.run.checkpoint import Checkpointer
from qsr.run.tracking import JsonlTracker
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE
from qsr.sync.flat import FlatModule
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.sync.topology import Topology
from qsr.train.evaluation import BatchNormSource, Evaluator
from qsr.train.losses import TrainingLoss
from qsr.train.models import build_model
from qsr.train.monitor import Monitor
from qsr.train.optim import build_optimizer
from qsr.train.precision import Precision
from qsr.train.state import RunState
from qsr.train.step import Stepper
from qsr.train.trainer import Due, Trainer, TrainingData
from qsr.train.weight_average import WeightAverages
from qsr.train.worker import Worker

CPU = torch.device("cpu")
BARE, TRAINER = "bare loop", "trainer"
ADAMW = AdamWConfig("adamw", 0.9, 0.999, 1e-8, 0.05, None)


@dataclasses.dataclass(frozen=True)
class Case:
    """The size of a step."""

    model: Literal["linear", "small_resnet", "small_vit"]
    image_size: int
    batch: int
    turns: int
    """Turns of each of the two loops."""


TURN = 20
"""Steps per turn; the trainer logs at the end of each."""
REPETITIONS = 5
"""Repetitions, each with new networks."""

CASES = {
    "next to no arithmetic": Case("linear", 8, 8, 100),
    "small step": Case("small_resnet", 32, 8, 30),
    "large step": Case("small_vit", 32, 24, 12),
}


def network(case: Case) -> nn.Module:
    """A network, with the same weights every time."""
    torch.manual_seed(0)
    if case.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * case.image_size**2, 10))
    settings = ModelConfig(case.model, None, channels_last=False)
    return build_model(settings, 10, case.image_size)


def random_batches(case: Case) -> list[Batch]:
    """A few batches, used repeatedly."""
    generator = torch.Generator().manual_seed(1)
    size = (case.batch, 3, case.image_size, case.image_size)
    return [
        Batch(
            torch.randn(size, generator=generator),
            torch.randint(10, (case.batch,), generator=generator),
        )
        for _ in range(4)
    ]


class BareLoop:
    """A minimal correct training loop."""

    def __init__(self, case: Case) -> None:
        self._batches = random_batches(case)
        self._model = network(case)
        self._model.train()
        self._optimizer = build_optimizer(ADAMW, self._model.parameters(), fused=False)
        self._loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
        self._schedule = CosineSchedule(1e-3, 1e-6, 10, total_steps(case))
        self._step = 0

    def take(self, steps: int) -> None:
        """Train for `steps` more steps."""
        for step in range(self._step, self._step + steps):
            for group in self._optimizer.param_groups:
                group["lr"] = self._schedule(step)
            images, labels = self._batches[step % 4]
            # before the forward pass, so that activations reuse the memory of gradients
            self._optimizer.zero_grad(set_to_none=True)
            loss: Tensor = self._loss_function(self._model(images), labels)
            loss.backward()
            self._optimizer.step()
        self._step += steps


class MemoryLoader:
    """Batches in memory, for the trainer. Between its turns it runs the bare loop."""

    def __init__(self, case: Case) -> None:
        self._batches = random_batches(case)
        self._bare = BareLoop(case)
        self.seconds_per_step: dict[str, list[float]] = {BARE: [], TRAINER: []}

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        resumed = time.perf_counter()
        for number, _ in enumerate(requests):
            if number > 0 and number % TURN == 0:
                paused = time.perf_counter()
                self._bare.take(TURN)
                ended = time.perf_counter()
                if number > TURN:
                    self.seconds_per_step[TRAINER].append((paused - resumed) / TURN)
                    self.seconds_per_step[BARE].append((ended - paused) / TURN)
                resumed = time.perf_counter()
            yield self._batches[number % 4]

    def close(self) -> None:
        """Nothing to close."""


def total_steps(case: Case) -> int:
    """Steps of the trainer's session; the last one requests the batch after the last turn."""
    return TURN * (case.turns + 1) + 1


def take_turns(case: Case) -> dict[str, list[float]]:
    """Loop -> seconds per step in each turn."""
    loader, steps = MemoryLoader(case), total_steps(case)
    communicator = Communicator(Topology(0, 1, 0, 1), CPU, timeout_seconds=60.0)
    precision = Precision("fp32", CPU)
    # the session stops before the end of the plan, where there would be an evaluation
    schedule = CosineSchedule(1e-3, 1e-6, 10, steps + 100)
    sampler = Sampler(case.batch * (steps + 100), case.batch, 1, seed=1)
    flat = FlatModule(network(case), FINGERPRINT_SIZE)
    optimizer = build_optimizer(ADAMW, flat.module.parameters(), fused=False)
    worker = Worker(0, flat, optimizer, precision.scaler())
    batchnorm = BatchNormSource(loader, sampler, case.batch, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracker = JsonlTracker(folder / "metrics.jsonl")
        plan, options = Plan(schedule, QuadraticRule(h_base=4, alpha=1e-3)), SyncOptions()
        synchronizer = Synchronizer(
            plan,
            [flat],
            [optimizer],
            communicator,
            sampler=sampler,
            config_hash="0123456789abcdef",
            options=options,
        )
        stepper = Stepper(
            [worker],
            synchronizer,
            Monitor(plan, sampler, communicator, precision),
            loss=TrainingLoss(LossConfig(label_smoothing=0.1, mixup_alpha=0.0)),
            micro_batch=case.batch,
            clip_norm=None,
            precision=precision,
            seed=1,
        )
        checkpointer = Checkpointer(folder / "checkpoints", 1, communicator)
        averages = WeightAverages(worker.model, EmaConfig(None, None), steps)
        trainer = Trainer(
            TrainingData(loader, sampler),
            stepper,
            synchronizer,
            Evaluator(
                network(case), loader, case.batch, case.batch, batchnorm, communicator, precision
            ),
            RunState([worker], synchronizer, checkpointer, averages),
            tracker,
            Due(TURN, 10**9, None, steps),
        )
        trainer.train()
        tracker.close()
    return loader.seconds_per_step


def measure(case: Case) -> dict[str, Any]:
    """All turns of all repetitions; differences and ratios are between neighbouring turns."""
    seconds: dict[str, list[float]] = {BARE: [], TRAINER: []}
    for _ in range(REPETITIONS):
        for name, values in take_turns(case).items():
            seconds[name] += values
    overhead = [t - b for t, b in zip(seconds[TRAINER], seconds[BARE], strict=True)]
    return {
        "case": dataclasses.asdict(case),
        "seconds_per_step": {name: summary(values) for name, values in seconds.items()},
        "ratio": ratio(seconds[TRAINER], seconds[BARE]),
        "overhead_seconds": summary(overhead),
    }


def main() -> int:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in CPU ranks of a run
    results = {name: measure(case) for name, case in CASES.items()}
    for name, found in results.items():
        bare, ours = (1e3 * about["median"] for about in found["seconds_per_step"].values())
        print(
            f"{name}: bare loop {bare:.2f} ms, trainer {ours:.2f} ms per step, "
            f"{1e3 * found['overhead_seconds']['median']:+.3f} ms, "
            f"{found['ratio']['median']:.3f} x"
        )
    print(record("trainer", {"cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
