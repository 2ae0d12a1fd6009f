"""Small runs for tests: a trainer on data in memory, and real processes that form a group."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.cluster.group import join_process_group, leave_process_group
from qsr.cluster.signals import StopFlag
from qsr.config import schema
from qsr.core.open_plan import AnyPlan
from qsr.core.outer import OuterOptions
from qsr.core.sampling import Sampler
from qsr.data import Batch, Request
from qsr.run.checkpoint import Checkpointer
from qsr.run.folder import Row
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE
from qsr.sync.flat import FlatModule
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.sync.topology import Topology
from qsr.train.compiling import CompileClock, compile_network
from qsr.train.evaluation import BatchNormSource, Evaluator
from qsr.train.losses import TrainingLoss
from qsr.train.monitor import Monitor
from qsr.train.optim import averaged_state_keys, build_optimizer
from qsr.train.precision import Precision
from qsr.train.profile import StepProfiler
from qsr.train.state import RunState
from qsr.train.step import Stepper
from qsr.train.trainer import Due, Trainer, TrainingData
from qsr.train.weight_average import WeightAverages
from qsr.train.worker import Worker

CPU = torch.device("cpu")
_SCRATCH = tempfile.TemporaryDirectory(prefix="qsr-tests-")


def new_folder() -> Path:
    """An empty folder that lives as long as the tests."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH.name))


class MemoryLoader:
    """Images and labels in memory. A request's seed adds noise, as augmentation would.

    The batches are copied to `device` without making the host wait.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, noise: float = 0.0, device: torch.device = CPU
    ) -> None:
        self.images, self.labels, self.noise, self.device = images, labels, noise, device
        self.requested: list[Request] = []

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            self.requested.append(request)
            indices = torch.tensor(request.indices)
            images = self.images[indices]
            if self.noise:
                generator = torch.Generator().manual_seed(request.seed)
                images = images + self.noise * torch.randn(images.shape, generator=generator)
            yield Batch(self._to_device(images), self._to_device(self.labels[indices]))

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        pass


class LossWithAccident:
    """Cross entropy that is multiplied by `value` in one micro-batch, counted over the workers of
    this rank."""

    def __init__(self, at: int, value: float) -> None:
        self.calls, self.at, self.value = 0, at, value

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        loss = functional.cross_entropy(model(images).float(), labels)
        self.calls += 1
        return loss * self.value if self.calls == self.at else loss


class MemoryTracker:
    """Keeps rows in a list."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: Row) -> None:
        self.rows.append(dict(row))

    def sync(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]

    def close(self) -> None:
        pass


def digits_like(samples: int = 96, classes: int = 4, size: int = 6) -> tuple[Tensor, Tensor]:
    """Images [n, 3, size, size] of `classes` noisy patterns, and their labels."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(classes, 3, size, size, generator=generator)
    labels = torch.arange(samples) % classes
    return patterns[labels] + 0.5 * torch.randn(samples, 3, size, size, generator=generator), labels


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 4))


def batchnorm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(80, 4),
    )


def sgd(**changes: Any) -> schema.SgdConfig:
    values = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": None}
    return schema.SgdConfig(name="sgd", **(values | changes))


def adamw(**changes: Any) -> schema.AdamWConfig:
    values = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05, "clip_norm": None}
    return schema.AdamWConfig(name="adamw", **(values | changes))


def constant_sync(**changes: Any) -> schema.ConstantSync:
    values = SYNC | {"h": 1}
    return schema.ConstantSync(rule="constant", **(values | changes))


SYNC: dict[str, Any] = {
    "average_momentum": False,
    "average_second_moment": False,
    "delay_steps": 0,
    "h_max": None,
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "outer_nesterov": False,
    "outer_rate_correction": False,
}
"""The settings that all rules share, as in the paper."""


NO_EMA = schema.EmaConfig(decay=None, uniform_fraction=None)
"""No average over time."""


@dataclass
class Setup:
    """A small run. Everything but `plan` has a default."""

    plan: AnyPlan
    workers: int = 2
    keep: int = 2
    global_batch: int = 8
    micro_batch: int | None = None
    net: Callable[[], nn.Module] = linear_net
    optimizer: schema.OptimizerConfig = field(default_factory=sgd)
    average_momentum: bool = False
    average_second_moment: bool = False
    precision: str = "fp32"
    compile: schema.Compile = "none"
    cuda_graphs: bool = False
    label_smoothing: float = 0.0
    noise: float = 0.1
    mixup_alpha: float = 0.0
    samples: int = 96
    seed: int = 1
    log_every: int = 5
    evaluate_every: int = 1000
    checkpoint_every: int | None = None
    stop_after: int | None = None
    stop: StopFlag = field(default_factory=StopFlag)
    timeout_seconds: float = 60.0
    bucket_mib: float | None = 25.0
    delay_steps: int = 0
    outer: OuterOptions = field(default_factory=OuterOptions)
    ema: schema.EmaConfig = NO_EMA
    folder: Path | None = None
    """Of the run; None: a new one."""
    config_hash: str = "0123456789abcdef"
    loss: Callable[..., Tensor] | None = None
    profiled: tuple[int, int] | None = None
    """First and last of the steps whose trace is written to profile/ in the folder."""


@dataclass
class Rig:
    trainer: Trainer
    workers: list[Worker]
    tracker: MemoryTracker
    evaluator: Evaluator
    loader: MemoryLoader
    communicator: Communicator

    def parameters(self, worker: int = 0) -> Tensor:
        """A copy of all parameters of one of this rank's workers."""
        module = self.workers[worker].model.module
        return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def build(setup: Setup, topology: Topology | None = None, device: torch.device = CPU) -> Rig:
    """Trainer and parts of one rank; joins the process group if there are several."""
    topology = topology or Topology(0, 1, 0, setup.workers)
    communicator = join_process_group(topology, device, setup.timeout_seconds)
    folder = setup.folder or Path(communicator.gather_texts(str(new_folder()))[0])
    folder.mkdir(parents=True, exist_ok=True)
    precision = Precision(setup.precision, device)  # type: ignore[arg-type]

    def make_net() -> nn.Module:
        torch.manual_seed(setup.seed)
        return setup.net().to(device)

    workers = []
    for index, shard in zip(topology.workers, topology.shards, strict=True):
        model = FlatModule(make_net(), FINGERPRINT_SIZE)
        compile_network(model.module, setup.compile)
        fused = device.type == "cuda" or setup.precision == "fp16"
        optimizer = build_optimizer(setup.optimizer, model.module.parameters(), fused=fused)
        workers.append(Worker(index, model, optimizer, precision.scaler(), shard))
    images, labels = digits_like(setup.samples)
    sampler = Sampler(setup.samples, setup.global_batch, topology.num_shards, setup.seed)
    micro_batch = setup.micro_batch or sampler.shard_size
    loader = MemoryLoader(images, labels, setup.noise, device)
    batchnorm_loader = MemoryLoader(images, labels, setup.noise, device)
    batchnorm = BatchNormSource(batchnorm_loader, sampler, micro_batch, 8)
    evaluator = Evaluator(
        make_net(),
        MemoryLoader(images, labels, device=device),
        len(labels),
        10,
        batchnorm,
        communicator,
        precision,
    )
    sync = constant_sync(
        average_momentum=setup.average_momentum,
        average_second_moment=setup.average_second_moment,
    )
    keys = averaged_state_keys(setup.optimizer, sync)
    tracker = MemoryTracker()
    options = SyncOptions(keys, setup.bucket_mib, setup.delay_steps, setup.outer)
    synchronizer = Synchronizer(
        setup.plan,
        [worker.model for worker in workers],
        [worker.optimizer for worker in workers],
        communicator,
        sampler=sampler,
        config_hash=setup.config_hash,
        options=options,
        asked_to_stop=lambda: setup.stop.reason is not None,
    )
    stepper = Stepper(
        workers,
        synchronizer,
        Monitor(setup.plan, sampler, communicator, precision),
        loss=setup.loss
        or TrainingLoss(schema.LossConfig(setup.label_smoothing, setup.mixup_alpha)),  # type: ignore[arg-type]
        micro_batch=micro_batch,
        clip_norm=setup.optimizer.clip_norm,
        precision=precision,
        seed=setup.seed,
        compile_clock=CompileClock() if setup.compile != "none" else None,
        cuda_graphs=setup.cuda_graphs,
    )
    profiler = None
    if setup.profiled is not None:
        profiler = StepProfiler(*setup.profiled, folder / "profile", communicator)
    checkpointer = Checkpointer(folder / "checkpoints", setup.keep, communicator)
    trainer = Trainer(
        TrainingData(loader, sampler),
        stepper,
        synchronizer,
        evaluator,
        RunState(
            workers,
            synchronizer,
            checkpointer,
            WeightAverages(workers[0].model, setup.ema, setup.plan.total_steps),
        ),
        tracker,
        Due(setup.log_every, setup.evaluate_every, setup.checkpoint_every, setup.stop_after),
        profiler,
    )
    return Rig(trainer, workers, tracker, evaluator, loader, communicator)


def train(setup: Setup, topology: Topology | None = None) -> Rig:
    """Build, resume if there is something to resume, and train."""
    rig = build(setup, topology)
    rig.trainer.restore()
    rig.trainer.train()
    return rig


def without_times(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of metrics without their kind, and without what two runs need not have in common."""
    left_out = ("kind", "waiting_percent")
    return [
        {k: v for k, v in row.items() if k not in left_out and "second" not in k} for row in rows
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call `function(rank, ranks, *arguments)` in `ranks` processes that can form a gloo group.

    Returns what each returned; an exception comes back as its text, a dead process as its exit
    code in an int.
    """
    context = multiprocessing.get_context("forkserver")
    # imported once by the fork server instead of by every process
    context.set_forkserver_preload(["tests.support"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(function, rank, ranks, port, sender, arguments), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: list[Any] = []
    for receiver, process in zip(pipes, processes, strict=True):
        try:
            results.append(receiver.recv())
        except EOFError:
            process.join()
            results.append(process.exitcode)
    for process in processes:
        process.join(30)
        process.kill()
    return results


def _rank_main(
    function: Callable[..., Any], rank: int, ranks: int, port: int, sender: Any, arguments: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        sender.send(function(rank, ranks, *arguments))
    except Exception as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        leave_process_group()
