"""Training steps on a GPU: how fast compared with timm, and with the GPU's limits?

    python scripts/bench.py gpu                  all parts, each in its own process
    python scripts/bench.py gpu_graphs           one of them
    python -m benchmarks.gpu PART [--rehearsal] [--folder FOLDER]

Parts, each under five minutes on an H100:

steps_eager, steps_compiled: ViT-B/16 and ResNet-152 at 224 pixels, in bf16 and fp16: steps of 1,024
    images in micro-batches of 64, alternating between qsr (1, 4 and 16 workers on one GPU) and the
    loop of timm's train.py with gradient accumulation. In fp16 also during the search for the loss
    scale, when the host waits in every step. With the average at the end of a round (eager only).
graphs: micro-batches of 32, as the paper's ResNet: eager, as CUDA graphs, and compiled graphs.
loading: JPEGs to normalised tensors on the device.
end_to_end: the trainer with the paper's recipes, from JPEG files and from images in memory.

For comparison with the limits: large matrix products and, for the average, a copy of as many bytes.
Per step: images/s, the share of the matrix products' speed, memory, and whether the host ever
waits. A failed case is recorded with its reason; cases that would start after LIMIT_SECONDS are
skipped and recorded as such. Writes results/bench/gpu_PART_DEVICE.json. `--rehearsal` tests the
program on the CPU at small size, and writes to a temporary folder.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy
from timm.utils.cuda import NativeScaler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.end_to_end import measure_end_to_end
from benchmarks.measure import (
    RESULTS,
    alternate,
    device_slug,
    peak_memory_bytes,
    ratio,
    record,
    summary,
)
from benchmarks.photos import SIZE, write_photos
from qsr import ConstantRule, ConstantSchedule, Plan
from qsr.config.load import load_config
from qsr.config.schema import AdamWConfig, LossConfig, ModelConfig, OptimizerConfig, SgdConfig
from qsr.core.sampling import Sampler
from qsr.data import Batch, ImageFolder, Loader, Request, TrainTransform, make_loader
from qsr.sync.averaging import mean_
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE
from qsr.sync.flat import FlatModule
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.sync.topology import Topology
from qsr.train.losses import TrainingLoss
from qsr.train.models import build_model
from qsr.train.monitor import Monitor
from qsr.train.optim import build_optimizer
from qsr.train.precision import SETTLED_STEPS, Precision
from qsr.train.step import Stepper
from qsr.train.worker import Worker

Half = Literal["bf16", "fp16"]
DTYPES: dict[Half, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT_SECONDS = 200
LR = 1e-3
LABEL_SMOOTHING = 0.1
TIMM = "timm"
COPY = "copy"
Found = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """A network in qsr and its closest equivalent in timm: the same ResNet-152; a ViT-B/16 with the
    same matrix products, except for biases in attention."""

    model: ModelConfig
    optimizer: OptimizerConfig
    variants: tuple["Variant", ...]
    timm_name: str
    timm_options: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A configuration of qsr's training."""

    workers: int
    tuned: bool = False
    """With cudnn.benchmark, which timm's train.py enables. qsr does not, because it selects
    algorithms by timing, so a resumed run could differ from an uninterrupted one."""

    searching: bool = False
    """In fp16: during the search for the loss scale, when the host waits in every step."""

    graphs: bool = False
    """Passes as CUDA graphs; a rehearsal on the CPU makes eager ones."""

    compiled: bool = False
    """With torch.compile, in a case that is eager otherwise."""

    @property
    def name(self) -> str:
        plural = "s" if self.workers > 1 else ""
        name = f"qsr, {self.workers} worker{plural}" + ", cudnn.benchmark" * self.tuned
        name += ", scale searched" * self.searching
        return name + ", compiled" * self.compiled + ", CUDA graphs" * self.graphs


@dataclass(frozen=True)
class Size:
    """The sizes and numbers of repetitions of all measurements."""

    device: torch.device
    networks: tuple[Network, ...]
    """The average is measured with the parameters of the first."""
    classes: int
    pixels: int
    micro_batch: int
    graphed_micro_batch: int
    """That of the cases with CUDA graphs."""
    micro_batches: int
    """Micro-batches per step, over all workers."""
    repetitions: int
    backend: str
    """The backend of torch.compile."""
    matrix: int
    photos: int
    photo_size: tuple[int, int]
    loader_batch: int
    loader_batches: int
    decoders: tuple[tuple[Literal["cpu", "gpu"], int], ...]
    """Where JPEGs are decoded, and with how many threads."""

    @property
    def images(self) -> int:
        """Images per step."""
        return self.micro_batch * self.micro_batches


VIT = ModelConfig("vit_b16", None, channels_last=False)
RESNET = ModelConfig("resnet152", None, channels_last=True)
SMALL_VIT = ModelConfig("small_vit", None, channels_last=False)
SMALL_RESNET = ModelConfig("small_resnet", None, channels_last=True)
ADAMW = AdamWConfig("adamw", 0.9, 0.999, 1e-8, 0.05, None)
SGD = SgdConfig("sgd", 0.9, nesterov=False, weight_decay=1e-4, clip_norm=None)
WORKERS = (Variant(1), Variant(1, searching=True), Variant(4), Variant(16))
GRAPHED = (
    Variant(1),
    Variant(1, graphs=True),
    Variant(4, graphs=True),
    Variant(1, compiled=True, graphs=True),
)
# no class token; mean over all tokens before the head
SIMPLE = {"class_token": False, "global_pool": "avg", "fc_norm": False}
NETWORKS = (
    Network(VIT, ADAMW, WORKERS, "vit_base_patch16_224", SIMPLE),
    Network(RESNET, SGD, (*WORKERS, Variant(1, tuned=True)), "resnet152", {}),
)


def full_size() -> Size:
    cores = len(os.sched_getaffinity(0))
    return Size(
        device=torch.device("cuda", torch.cuda.current_device()),
        networks=NETWORKS,
        classes=1000,
        pixels=224,
        micro_batch=64,
        graphed_micro_batch=32,
        micro_batches=16,
        repetitions=5,
        backend="inductor",
        matrix=8192,
        photos=600,
        photo_size=SIZE,
        loader_batch=256,
        loader_batches=8,
        decoders=(("gpu", 4), ("gpu", cores), ("cpu", cores)),
    )


def rehearsal_size() -> Size:
    """Small networks of the same kinds; timm's differ slightly in size."""
    vit = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 16, **SIMPLE}
    resnet = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64), "output_stride": 8}
    return Size(
        device=torch.device("cpu"),
        networks=(
            Network(SMALL_VIT, ADAMW, WORKERS, "vit_tiny_patch16_224", vit),
            Network(SMALL_RESNET, SGD, (*WORKERS, Variant(1, tuned=True)), "resnet18", resnet),
        ),
        classes=10,
        pixels=16,
        micro_batch=1,
        graphed_micro_batch=2,
        micro_batches=16,
        repetitions=2,
        backend="eager",
        matrix=128,
        photos=8,
        photo_size=(64, 48),
        loader_batch=4,
        loader_batches=2,
        decoders=(("cpu", 1),),
    )


# The device


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that `action` takes on the device."""
    wait_for(device)
    started = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - started


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(action: Callable[[], object], device: torch.device, before: int) -> int:
    """Peak memory during `action` above `before`, in bytes; on the CPU above the memory in use at
    its start."""
    if device.type != "cuda":
        return peak_memory_bytes(action)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Operations that make the host wait for the device raise RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def never_waits(step: Callable[[], None], device: torch.device) -> bool | str | None:
    """True if the host never waits in two steps, otherwise the reason; None without a GPU."""
    if device.type != "cuda":
        return None
    try:
        with no_waiting(device):
            step()
            step()
    except RuntimeError as error:
        return reason(error)
    return True


def reason(error: BaseException) -> str:
    """The error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def tried(cases: Mapping[str, Callable[[], T]], found: Found) -> dict[str, T]:
    """The result of each successful case; the errors of failed cases are added to `found`."""
    working = {}
    for name, case in cases.items():
        try:
            working[name] = case()
        except Exception as error:  # the other cases still run
            found[name] = {"error": reason(error)}
            print(f"{name}: {found[name]['error']}", flush=True)
        release_memory()
    return working


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Training steps


def flops_per_image(network: Network, classes: int, pixels: int) -> int:
    """FLOPs of the forward and backward passes of the model, without recomputation in kernels."""
    with torch.device("meta"):
        model = build_model(network.model, classes, pixels)
        image = torch.empty(1, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return int(counter.get_total_flops())


def batch(size: Size) -> Batch:
    """One micro-batch, on the device."""
    shape = (size.micro_batch, 3, size.pixels, size.pixels)
    labels = torch.randint(size.classes, shape[:1], device=size.device)
    return Batch(torch.randn(shape, device=size.device), labels)


def tune_convolutions(tuned: bool) -> None:
    torch.backends.cudnn.benchmark = tuned
    # torch caches the first algorithm that it finds, benchmarked or not. This flag has no effect in
    # half precision, but it is part of the cache key and so separates the two.
    torch.backends.cudnn.allow_tf32 = tuned


def timm_step(network: Network, precision: Half, compiled: bool, size: Size) -> Callable[[], None]:
    """A step of timm's train.py with --amp, --channels-last, --torchcompile and
    --grad-accum-steps."""
    device, accumulate = size.device, size.micro_batches
    model: nn.Module = timm.create_model(
        network.timm_name, num_classes=size.classes, **network.timm_options
    ).to(device)
    if network.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # weight decay on all parameters, as in qsr; train.py would exclude norms and biases
    match network.optimizer:
        case AdamWConfig() as adamw:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                model.parameters(), LR, weight_decay=adamw.weight_decay, fused=True
            )
        case SgdConfig() as sgd:
            optimizer = torch.optim.SGD(
                model.parameters(), LR, sgd.momentum, weight_decay=sgd.weight_decay, fused=True
            )
    loss_function: Any = LabelSmoothingCrossEntropy(LABEL_SMOOTHING)  # type: ignore[no-untyped-call]
    scaler: Any = None
    if precision == "fp16":
        scaler = NativeScaler(device=device.type)  # type: ignore[no-untyped-call]
    if compiled:
        model = torch.compile(model, backend=size.backend)  # type: ignore[assignment]
    model.train()
    images, labels = batch(size)

    def step() -> None:
        tune_convolutions(True)
        for number in range(accumulate):
            update = number + 1 == accumulate
            x = images
            if network.model.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, DTYPES[precision]):
                loss = loss_function(model(x), labels) / accumulate
            if scaler is not None:
                scaler(loss, optimizer, need_update=update)
                continue
            loss.backward()
            if update:
                optimizer.step()
        optimizer.zero_grad()

    return step


def qsr_step(
    network: Network, precision: Half, compiled: bool, variant: Variant, size: Size
) -> Callable[[], None]:
    """A local step of all workers, as in the trainer."""
    workers = [
        new_worker(network, precision, compiled or variant.compiled, variant, i, size)
        for i in range(variant.workers)
    ]
    stepper = new_stepper(workers, precision, size, graphs=variant.graphs)
    images, labels = batch(size)
    each = size.micro_batches // variant.workers
    local = Batch(images.repeat(each, 1, 1, 1), labels.repeat(each))
    numbers = count()

    def step() -> None:
        tune_convolutions(variant.tuned)
        number = next(numbers)
        for worker in workers:
            stepper.find_gradients([worker], repeat(local), number)
        for worker in workers:
            stepper.update(worker, LR)

    return step


def new_worker(
    network: Network, precision: Half, compiled: bool, variant: Variant, index: int, size: Size
) -> Worker:
    model = build_model(network.model, size.classes, size.pixels).to(size.device)
    flat = FlatModule(model, FINGERPRINT_SIZE)
    optimizer = build_optimizer(network.optimizer, model.parameters(), fused=True)
    if compiled:
        model.compile(backend=size.backend)  # in place, which keeps the parameter names
    scaler = Precision(precision, size.device).scaler()
    if scaler.is_enabled() and not variant.searching:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0, "held_steps": SETTLED_STEPS})
    return Worker(index, flat, optimizer, scaler)


def new_stepper(workers: list[Worker], precision: Half, size: Size, *, graphs: bool) -> Stepper:
    number_format = Precision(precision, size.device)
    communicator = Communicator(Topology(0, 1, 0, len(workers)), size.device, timeout_seconds=60.0)
    steps = 10**6
    sampler = Sampler(steps * size.images, size.images, len(workers), seed=1)
    plan = Plan(ConstantSchedule(LR, steps), ConstantRule(4))
    synchronizer = Synchronizer(
        plan,
        [worker.model for worker in workers],
        [worker.optimizer for worker in workers],
        communicator,
        sampler=sampler,
        config_hash="0123456789abcdef",
        options=SyncOptions(),
    )
    return Stepper(
        workers,
        synchronizer,
        Monitor(plan, sampler, communicator, number_format),
        loss=TrainingLoss(LossConfig(LABEL_SMOOTHING, mixup_alpha=0.0)),
        micro_batch=size.micro_batch,
        clip_norm=None,
        precision=number_format,
        seed=1,
        cuda_graphs=graphs and size.device.type == "cuda",
    )


def warm(build: Callable[[], Callable[[], None]], size: Size) -> tuple[Callable[[], None], Found]:
    """A warmed-up step (compiled, optimizer state allocated), and its compile time and memory."""
    before = allocated_bytes(size.device)
    step = build()
    compiling = timed(step, size.device)
    memory = peak_bytes(step, size.device, before)
    return step, {
        "first_step_seconds": compiling,
        "peak_memory_bytes": memory,
        "host_never_waits": never_waits(step, size.device),
    }


def measure_steps(
    network: Network, precision: Half, compiled: bool, ceiling: float, size: Size
) -> Found:
    """timm's and qsr's steps, alternating; `ceiling` is in FLOP/s."""
    torch._dynamo.reset()
    builders = {TIMM: partial(timm_step, network, precision, compiled, size)} | {
        v.name: partial(qsr_step, network, precision, compiled, v, size)
        for v in network.variants
        if precision == "fp16" or not v.searching
    }
    found: Found = {}
    ready = tried({name: partial(warm, build, size) for name, build in builders.items()}, found)
    seconds = alternate(
        {name: partial(timed, step, size.device) for name, (step, _) in ready.items()},
        size.repetitions,
    )
    flops = flops_per_image(network, size.classes, size.pixels)
    for name, (_, about) in ready.items():
        rates = [size.images / value for value in seconds[name]]
        found[name] = about | {
            "images_per_second": summary(rates),
            "share_of_matrix_products": summary([rate * flops / ceiling for rate in rates]),
        }
        if TIMM in seconds:
            found[name]["speed_to_timm"] = ratio(seconds[TIMM], seconds[name])
    return {"flop_per_image": flops, "images_per_step": size.images, "contenders": found}


# The limits


def measure_matrix_products(size: Size) -> Found:
    """FLOP/s of large matrix products, by precision."""

    def product(dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.randn(size.matrix, size.matrix, device=size.device).to(dtype) for _ in "ab")

        def ten() -> None:
            for _ in range(10):
                torch.mm(a, b)

        return lambda: timed(ten, size.device)

    seconds = alternate({name: product(dtype) for name, dtype in DTYPES.items()}, 10)
    flops = 10 * 2 * size.matrix**3
    return {name: summary([flops / value for value in values]) for name, values in seconds.items()}


def measure_loading(size: Size) -> Found:
    """Images/s from files to normalised tensors on the device, with DALI."""
    transforms = {
        name: TrainTransform.of(replace(load_config([experiment]).data, image_size=size.pixels))
        for name, experiment in (
            ("crop, flip", "experiment=resnet152_b4096/quadratic_h2"),
            ("crop, flip, RandAugment", "experiment=vit_b16_b4096/quadratic_h4"),
        )
    }
    loaders: list[Loader] = []
    with tempfile.TemporaryDirectory() as folder:
        photos, _ = write_photos(Path(folder), size.photos, size.photo_size)

        def start(
            transform: TrainTransform, decode: Literal["cpu", "gpu"], threads: int
        ) -> Callable[[], float]:
            loader = make_loader(
                "dali",
                photos,
                transform,
                batch_size=size.loader_batch,
                device=size.device,
                threads=threads,
                decode=decode,
            )
            loaders.append(loader)
            next(loader.batches(requests(photos, size)))
            return lambda: timed(partial(consume, loader, photos, size), size.device)

        found: Found = {}
        ready = tried(
            {
                f"{name}; decoded on the {decode.upper()}, {threads} threads": partial(
                    start, transform, decode, threads
                )
                for name, transform in transforms.items()
                for decode, threads in size.decoders
            },
            found,
        )
        try:
            seconds = alternate(ready, size.repetitions)
        finally:
            for loader in loaders:
                loader.close()
    images = size.loader_batch * size.loader_batches
    for name, values in seconds.items():
        found[name] = {"images_per_second": summary([images / value for value in values])}
    return found


def requests(photos: ImageFolder, size: Size) -> Iterator[Request]:
    for number in range(size.loader_batches):
        first = number * size.loader_batch
        yield Request([(first + i) % len(photos) for i in range(size.loader_batch)], seed=number)


def consume(loader: Loader, photos: ImageFolder, size: Size) -> None:
    for images, _ in loader.batches(requests(photos, size)):
        images.sum()


def measure_average(size: Size) -> Found:
    """Bytes/s that the average of several workers on one device moves, compared with a copy."""
    settings = size.networks[0].model
    found: Found = {}

    def start(workers: int) -> dict[str, Any]:
        replicas = [
            FlatModule(build_model(settings, size.classes, size.pixels).to(size.device)).flat
            for _ in range(workers)
        ]
        communicator = Communicator(Topology(0, 1, 0, workers), size.device, 60.0)
        buffers = [replica.buffers for replica in replicas]

        def average() -> None:
            mean_(communicator, buffers)

        # per worker except the first: an addition (two reads, one write) and a copy; one division
        moved = (5 * (workers - 1) + 2) * replicas[0].bytes
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=size.device)
        target = torch.empty_like(source)
        seconds = alternate(
            {
                name: partial(timed, action, size.device)
                for name, action in {"average": average, COPY: lambda: target.copy_(source)}.items()
            },
            2 * size.repetitions,
        )
        extra = peak_bytes(average, size.device, allocated_bytes(size.device))
        return {
            "parameter_bytes": replicas[0].bytes,
            "moved_bytes": moved,
            "bytes_per_second": {
                name: summary([moved / value for value in values])
                for name, values in seconds.items()
            },
            "speed_to_copy": ratio(seconds[COPY], seconds["average"]),
            "seconds": summary(seconds["average"]),
            "extra_bytes": extra,
        }

    done = tried({f"{workers} workers": partial(start, workers) for workers in (2, 4)}, found)
    return found | done


# All together


def measure_cases(
    cases: Mapping[str, tuple[Network, Half, bool]], ceiling: Found, size: Size
) -> Found:
    """The steps of each case that begins in time: network, precision, compiled."""
    began = time.monotonic()
    steps: Found = {}
    for name, (network, precision, compiled) in cases.items():
        if time.monotonic() - began > LIMIT_SECONDS:
            steps[name] = {"error": f"left out: it would begin after {LIMIT_SECONDS} s"}
            continue
        print(f"-- {name}", flush=True)
        speed = ceiling[precision]["median"]
        case = partial(measure_steps, network, precision, compiled, speed, size)
        steps |= tried({name: case}, steps)
        show_rates(steps[name].get("contenders", {}))
    return {"matrix_product_flop_per_second": ceiling, "steps": steps}


def measure_ceiling(size: Size) -> Found:
    speeds = measure_matrix_products(size)
    for name, speed in speeds.items():
        print(f"matrix products, {name}: {speed['median'] / 1e12:.1f} TFLOP/s", flush=True)
    return speeds


def steps_eager(size: Size) -> Found:
    failed: Found = {}
    found = tried({"average": partial(measure_average, size)}, failed) | failed
    show_average(found["average"])
    return found | _steps(size, compiled=False)


def steps_compiled(size: Size) -> Found:
    return _steps(size, compiled=True)


def _steps(size: Size, *, compiled: bool) -> Found:
    cases = {
        f"{network.model.name}, {precision}": (network, precision, compiled)
        for precision in DTYPES
        for network in size.networks
    }
    return measure_cases(cases, measure_ceiling(size), size)


def graphs(size: Size) -> Found:
    """ResNet first: its launches are what graphs are for."""
    small = replace(size, micro_batch=size.graphed_micro_batch)
    cases = {
        f"{network.model.name}, {precision}": (
            replace(network, variants=GRAPHED),
            precision,
            False,
        )
        for network in reversed(size.networks)
        for precision in DTYPES
    }
    return measure_cases(cases, measure_ceiling(size), small)


def loading(size: Size) -> Found:
    found = measure_loading(size)
    show_rates(found)
    return found


PARTS: dict[str, Callable[[Size], Found]] = {
    "steps_eager": steps_eager,
    "steps_compiled": steps_compiled,
    "graphs": graphs,
    "loading": loading,
    "end_to_end": lambda size: measure_end_to_end(size.device.type == "cpu"),
}


def show_average(found: Found) -> None:
    for name, about in found.items():
        if "error" not in about:
            print(
                f"average of {name}: {about['seconds']['median'] * 1e3:.2f} ms, "
                f"{about['bytes_per_second']['average']['median'] / 1e9:.0f} GB/s, "
                f"{about['speed_to_copy']['median']:.2f} x a copy's speed, "
                f"{about['extra_bytes'] / 1e6:.0f} MB of extra memory",
                flush=True,
            )


def show_rates(found: Found) -> None:
    for name, about in found.items():
        if "images_per_second" not in about:
            continue
        line = f"{name:48} {about['images_per_second']['median']:8.0f} images/s"
        if "share_of_matrix_products" in about:
            line += (
                f"  {about['share_of_matrix_products']['median']:5.1%} of matrix products"
                f"  {about['peak_memory_bytes'] / 2**30:6.2f} GiB"
            )
        print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.rehearsal:
        size, device = rehearsal_size(), "rehearsal"
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="qsr-rehearsal-"))
    elif torch.cuda.is_available():
        size, device = full_size(), device_slug()
        folder = arguments.folder or RESULTS
    else:
        print(
            "this benchmark needs a GPU, and torch sees none: use --rehearsal to test on the CPU",
            file=sys.stderr,
        )
        return 1
    began = time.monotonic()
    found = PARTS[arguments.part](size)
    name = f"gpu_{arguments.part}_{device}"
    print(record(name, found | {"seconds": time.monotonic() - began}, folder=folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
