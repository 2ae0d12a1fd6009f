"""What can only be seen on a GPU. Runs by hand: `pytest tests/gpu`; skipped where there is none.

The session leaves its measurements in results/bench/gpu_DEVICE.json.
"""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import RESULTS, device_slug
from qsr import ConstantRule, ConstantSchedule, CosineSchedule, EveryStepRule, Plan, QuadraticRule
from qsr.cluster.group import leave_process_group
from qsr.config.load import load_config
from qsr.config.schema import ModelConfig
from qsr.core.sampling import Sampler
from qsr.data import (
    Batch,
    EvalTransform,
    ImageFolder,
    Request,
    decoders_at_work,
    make_loader,
    open_image_folders,
)
from qsr.data.randaugment import RandAugment
from qsr.data.randaugment_pillow import augment_image
from qsr.data.randaugment_torch import augment_batch
from qsr.data.transforms import draw
from qsr.errors import DisagreementError
from qsr.planner.calibrate import measure
from qsr.sync.averaging import Averager
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers
from qsr.sync.topology import Topology
from qsr.train.models import build_model
from qsr.train.precision import SETTLED_STEPS, LossScale
from tests.sleeping import put_to_sleep
from tests.support import (
    MemoryLoader,
    Rig,
    Setup,
    adamw,
    batchnorm_net,
    build,
    free_port,
    sgd,
)
from tests.transforms import eval_transform, train_transform

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; torch sees none", allow_module_level=True)

# for deterministic matrix products; read when the first one creates its handle
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CUDA = torch.device("cuda")

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=4, total_steps=24)
LOCAL = Plan(COSINE, QuadraticRule(h_base=2, alpha=0.15))
GRADIENTS = Plan(COSINE, EveryStepRule("gradients"))

MARK = Fingerprint(8, 2, 4, 0.1, Sampler(96, 8, 2, seed=1), config="cafe")

Record = dict[str, Any]


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """What the tests saw, by test; written to results/bench at the end."""
    seen: Record = {}
    yield seen
    if not seen:
        return
    machine = {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(str(part) for part in torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(machine | dict(sorted(seen.items())), indent=2)
    (RESULTS / f"gpu_{device_slug()}.json").write_text(text + "\n")


def calm_scale(rig: Rig) -> Rig:
    """Loss scales so low that nothing overflows: fp16 then takes the same steps as fp32."""
    for worker in rig.workers:
        if worker.scaler.is_enabled():
            worker.scaler = LossScale(CUDA.type, repeat=False, init_scale=256.0)
    return rig


def settled_scale(rig: Rig) -> Rig:
    """Loss scales that have held for long: only while they are looked for does the host wait."""
    for worker in rig.workers:
        if worker.scaler.is_enabled():
            worker.scaler = LossScale(CUDA.type, init_scale=256.0)
            state = worker.scaler.state_dict()
            worker.scaler.load_state_dict(state | {"held_steps": SETTLED_STEPS})
    return rig


# The host runs ahead of the device


class Watch:
    """Makes every operation that waits for the device an error, from the second step on and
    except while something is due."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        self._deliver = rig.loader.batches
        self._check = Averager.check
        self._workers = len(rig.workers)
        monkeypatch.setattr(rig.loader, "batches", self.deliver)
        # the first thing the trainer does when something is due
        monkeypatch.setattr(Averager, "check", lambda averager: self.check(averager))

    def deliver(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for number, batch in enumerate(self._deliver(requests)):
            if number >= self._workers:  # the first step makes the scale and cuDNN's handles
                self.batches += 1
                torch.cuda.set_sync_debug_mode("error")
            yield batch

    def check(self, averager: Averager) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._check(averager)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Rig], Watch]]:
    yield lambda rig: Watch(rig, monkeypatch)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": sgd(momentum=0.9, weight_decay=0.01, clip_norm=1.0), "mixup_alpha": 0.2},
        {"optimizer": adamw(), "average_momentum": True, "average_second_moment": True},
        {"micro_batch": 2, "workers": 1},
        {"micro_batch": 2, "cuda_graphs": True, "mixup_alpha": 0.2},
    ],
    ids=["sgd", "adamw", "one_worker", "graphs"],
)
@pytest.mark.parametrize("plan", [LOCAL, GRADIENTS], ids=["local", "data_parallel"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(
    watch: Callable[[Rig], Watch], precision: str, plan: Plan, changes: dict[str, Any]
) -> None:
    setup = Setup(plan, net=batchnorm_net, precision=precision, log_every=8)
    rig = settled_scale(build(replace(setup, **changes), device=CUDA))
    watched = watch(rig)
    rig.trainer.train()
    assert rig.trainer.finished
    assert watched.batches == 23 * len(rig.workers)
    assert rig.parameters().isfinite().all()


def test_the_watch_sees_a_host_that_waits(watch: Callable[[Rig], Watch]) -> None:
    def looks_at_its_loss(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        loss = functional.cross_entropy(model(x).float(), y)
        return loss * (1.0 if loss.item() > 0 else 2.0)

    rig = build(Setup(LOCAL, loss=looks_at_its_loss), device=CUDA)
    watch(rig)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        rig.trainer.train()


def test_only_a_device_that_has_nothing_to_do_waits_for_data() -> None:
    """While the loader sleeps the host waits for it, the device only if its queue is empty."""

    def for_long(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torch.cuda._sleep(400_000_000)  # of the device's cycles, a fifth of a second
        return functional.cross_entropy(model(x).float(), y)

    for loss, waits in ((None, True), (for_long, False)):
        rig = build(Setup(LOCAL, loss=loss, log_every=1000), device=CUDA)
        sleeper = put_to_sleep(rig)
        rig.trainer.train()
        progress = rig.trainer.progress
        assert progress.data_seconds >= sleeper.seconds
        assert (progress.data_idle_seconds > 0.5 * sleeper.seconds) == waits


# The same run again


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


def run(setup: Setup) -> Rig:
    rig = build(setup, device=CUDA)
    rig.trainer.restore()
    rig.trainer.train()
    return rig


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": GRADIENTS},
        {"optimizer": adamw(clip_norm=1.0), "micro_batch": 2, "average_momentum": True},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp16", "optimizer": adamw()},
        {"cuda_graphs": True, "micro_batch": 2, "precision": "bf16"},
        {"compile": "default", "micro_batch": 2, "precision": "bf16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [10, 11])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stop: int
) -> None:
    """Bit for bit, at a round's end and within a round."""
    setup = Setup(
        LOCAL,
        net=batchnorm_net,
        optimizer=sgd(momentum=0.9),
        mixup_alpha=0.2,
        checkpoint_every=5,
        folder=tmp_path,
    )
    setup = replace(setup, **changes)
    whole = run(replace(setup, folder=None))
    run(replace(setup, stop_after=stop))
    resumed = run(setup)
    assert len(resumed.loader.requested) == (24 - stop) * 2
    for ours, theirs in zip(resumed.workers, whole.workers, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in theirs.tensors().items():
            found = ours.tensors()[name]
            assert found.device == tensor.device, name
            assert torch.equal(found, tensor), name
        assert ours.values() == theirs.values()
    assert resumed.trainer.evaluation == whole.trainer.evaluation


# CUDA graphs


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 1},
        {"workers": 4, "global_batch": 16},
        {"plan": GRADIENTS},
        {"optimizer": adamw(clip_norm=1.0)},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"compile": "default"},
    ],
    ids=str,
)
def test_graphs_are_the_eager_passes(changes: dict[str, Any]) -> None:
    """Over 24 steps, with dropout, BatchNorm, mixup and label smoothing; bit for bit in fp32, and
    in fp16 through the search for the loss scale."""
    setup = Setup(
        LOCAL,
        net=batchnorm_net,
        optimizer=sgd(momentum=0.9),
        micro_batch=2,
        mixup_alpha=0.2,
        label_smoothing=0.1,
    )
    setup = replace(setup, **changes)
    eager, graphed = run(setup), run(replace(setup, cuda_graphs=True))
    for ours, theirs in zip(graphed.workers, eager.workers, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in theirs.tensors().items():
            found = ours.tensors()[name]
            if setup.precision == "fp32":
                assert torch.equal(found, tensor), name
            else:
                torch.testing.assert_close(found, tensor, rtol=1e-2, atol=1e-3, msg=name)
        assert ours.values() == theirs.values()
    losses = [
        [row["loss"] for row in rig.tracker.rows if row["kind"] == "train"]
        for rig in (graphed, eager)
    ]
    assert losses[0] == (pytest.approx(losses[1], rel=1e-2) if changes else losses[1])


class Awkward(nn.Module):
    """A network that cannot be captured."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(108, 4)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        if self.how == "waits":
            return logits * (1.0 if logits.sum().item() > 0 else 2.0)
        return logits * (1.0 + torch.rand(1).item())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("waits", "the host waits for the device in it"),
        ("draws", "it draws random numbers on the host"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(
    capsys: pytest.CaptureFixture[str], how: str, reason: str
) -> None:
    setup = Setup(LOCAL, net=lambda: Awkward(how), micro_batch=2)
    expected = run(setup).parameters()
    capsys.readouterr()
    found = run(replace(setup, cuda_graphs=True)).parameters()
    assert torch.equal(found, expected)
    line = f"note: without CUDA graphs: the pass cannot be captured: {reason}\n"
    assert capsys.readouterr().err == line


def large_activations() -> nn.Module:
    """75 MB for each of its largest tensors at 8 images; hardly any parameters."""
    return nn.Sequential(
        nn.Upsample(scale_factor=32),
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def test_the_graphs_of_all_workers_share_their_memory(record: Record) -> None:
    taken: list[int] = []
    for workers in (1, 4):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        rig = run(
            Setup(
                LOCAL,
                workers=workers,
                global_batch=8 * workers,
                net=large_activations,
                cuda_graphs=True,
                stop_after=2,  # before any evaluation
            )
        )
        taken.append(torch.cuda.memory_reserved() - before)
        del rig
        gc.collect()
    record["graphs_reserved_bytes"] = {"1 worker": taken[0], "4 workers": taken[1]}
    assert taken[0] > 100 * 2**20
    assert taken[1] < 1.5 * taken[0]


# Half precision


def small_resnet() -> nn.Module:
    return build_model(ModelConfig("small_resnet", None, channels_last=True), 4, 6)


# Largest difference of a step's mean loss to fp32's. Autocast on a CPU showed 0.004 (bf16) and
# 0.001 (fp16) while the loss fell from 1.65 to 0.0002; fp32 convolutions on a GPU use TF32.
LOSS_TOLERANCE = {"bf16": 0.03, "fp16": 0.02}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_single_precision(record: Record, precision: str) -> None:
    plan = Plan(CosineSchedule(0.1, 1e-4, 2, 20), ConstantRule(4))
    setup = Setup(
        plan,
        global_batch=64,
        net=small_resnet,
        optimizer=sgd(momentum=0.9),
        noise=0.1,
        samples=128,
        log_every=1,
    )
    losses: dict[str, list[float]] = {}
    for kind in ("fp32", precision):
        rig = calm_scale(build(replace(setup, precision=kind), device=CUDA))
        rig.trainer.train()
        assert rig.trainer.progress.skipped_updates == 0
        losses[kind] = [row["loss"] for row in rig.tracker.rows if row["kind"] == "train"]
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    record.setdefault("small_resnet_losses", {}).update(losses)
    record.setdefault("small_resnet_largest_loss_difference", {})[precision] = difference
    assert len(losses["fp32"]) == 20
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert 0.0 < difference < LOSS_TOLERANCE[precision]


# NCCL


@pytest.fixture(scope="module")
def nccl() -> Iterator[None]:
    """A process group of one rank, made as the communicator makes it."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"tcp://localhost:{free_port()}",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )
    yield
    leave_process_group()


def communicator(workers: int) -> Communicator:
    """One that takes itself for a rank of two: it sends, and the group of one rank answers."""
    return Communicator(Topology(0, 2, 0, workers), CUDA, timeout_seconds=60.0)


@pytest.mark.usefixtures("nccl")
def test_sums_go_through_nccl_and_are_timed() -> None:
    comm = communicator(2)
    values = torch.arange(1_000_000, dtype=torch.float32, device=CUDA)
    expected = values.clone()
    comm.sum_(values)
    assert torch.equal(values, expected)  # the sum over one rank
    assert torch.equal(comm.total(values), expected)
    seconds = comm.seconds()
    assert 0.0 < seconds < 60.0
    comm.sum_(values)
    assert comm.seconds() > seconds


@pytest.mark.usefixtures("nccl")
def test_flags_of_the_host_travel_by_gloo() -> None:
    flags = torch.tensor([1.0, 2.0], dtype=torch.float64)
    dist.all_reduce(flags)
    assert flags.tolist() == [1.0, 2.0]


@pytest.mark.usefixtures("nccl")
def test_averages_by_value() -> None:
    replicas = [
        FlatBuffers([torch.full((3, 2), value, device=CUDA)], FINGERPRINT_SIZE)
        for value in (1.0, 4.0)
    ]
    averager = Averager(communicator(2))
    averager.average_(replicas, MARK)
    averager.check()
    for replica in replicas:
        assert torch.equal(replica.views[0], torch.full((3, 2), 2.5, device=CUDA))


@pytest.mark.usefixtures("nccl")
def test_disagreement_is_raised_at_the_next_check_and_not_before() -> None:
    """The second worker sends nothing, so that the fingerprint's mean is half of it."""
    replica = FlatBuffers([torch.ones(3, device=CUDA)], FINGERPRINT_SIZE)
    averager = Averager(communicator(2))
    averager.average_([replica], MARK)
    with pytest.raises(DisagreementError, match="disagree on step, round, h, lr, sampler, config"):
        averager.check()


# Decoding


def save_photos(root: Path, subsampling: int) -> ImageFolder:
    """12 structured JPEGs of many sizes; `subsampling` as Pillow counts it, 0: full colour."""
    for split in ("train", "val"):
        folder = root / split / "only"
        folder.mkdir(parents=True)
        for seed in range(12):
            random = np.random.default_rng(seed)
            width, height = random.integers(60, 400, 2).tolist()
            shape = (height // 16 + 2, width // 16 + 2, 3)
            coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            image = coarse.resize((width, height), Image.Resampling.BICUBIC)
            image.save(folder / f"{seed:02d}.jpg", quality=92, subsampling=subsampling)
    return open_image_folders(root)[1]


def decoding_difference(dataset: ImageFolder, transform: EvalTransform) -> Tensor:
    """|GPU - CPU| of the validation pixels, in grey levels."""
    levels = []
    for decode, device in (("gpu", CUDA), ("cpu", CUDA), ("cpu", torch.device("cpu"))):
        loader = make_loader(
            "dali",
            dataset,
            transform,
            batch_size=len(dataset),
            device=device,
            threads=2,
            decode=decode,  # type: ignore[arg-type]
        )
        batch = next(loader.batches([Request(range(len(dataset)), 0)]))
        assert batch.images.device.type == device.type
        assert batch.labels.tolist() == list(dataset.labels)
        std = torch.tensor(transform.std).view(3, 1, 1)
        levels.append(255 * batch.images.cpu() * std)
        loader.close()
    # on the GPU from the CPU's decoder, and on the CPU throughout: two resizers, each of which is
    # within a level of Pillow's
    assert (levels[1] - levels[2]).abs().max() <= 2.001
    return (levels[0] - levels[2]).abs()


def test_digits_decode_on_the_gpu_as_on_the_cpu(record: Record, digits: Path) -> None:
    pytest.importorskip("nvidia.dali")
    transform = EvalTransform(32, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    difference = decoding_difference(open_image_folders(digits)[1], transform)
    record["decode_digits_largest_difference"] = difference.max().item()
    assert difference.max() <= 3.0


@pytest.mark.parametrize(("colour", "subsampling"), [("full", 0), ("quarter", 2)])
def test_photos_decode_on_the_gpu_as_on_the_cpu(
    record: Record, tmp_path: Path, colour: str, subsampling: int
) -> None:
    pytest.importorskip("nvidia.dali")
    difference = decoding_difference(save_photos(tmp_path, subsampling), eval_transform(56))
    record[f"decode_{colour}_colour_largest_difference"] = difference.max().item()
    record[f"decode_{colour}_colour_mean_difference"] = difference.mean().item()
    assert difference.mean() < 1.0
    assert difference.max() <= 3.0


def test_the_gpu_decodes_and_says_nothing(record: Record, tmp_path: Path) -> None:
    """Boxes of the training pipeline too, which nvImageCodec itself would leave to the CPU."""
    pytest.importorskip("nvidia.dali")
    photos = save_photos(tmp_path, 2)
    decoder = decoders_at_work(photos, "gpu", CUDA)
    record["decoder"] = decoder
    assert decoder is not None
    assert "nvjpeg" in decoder
    assert "libjpeg_turbo" not in decoder
    pixels = []
    for decode in ("gpu", "cpu"):
        loader = make_loader(
            "dali",
            photos,
            train_transform(32),
            batch_size=12,
            device=CUDA,
            threads=2,
            decode=decode,
        )
        pixels.append(next(loader.batches([Request(range(12), 7)])).images.cpu())
        loader.close()
    assert (pixels[0] - pixels[1]).abs().mean() < 0.02  # of normalised pixels


# RandAugment


@pytest.mark.parametrize("kind", ["composer", "torchvision", "timm"])
def test_randaugment_is_the_cpus_and_waits_for_nothing(record: Record, kind: Any) -> None:
    """The same code on both devices. Fused multiplications may move a value over a whole level."""
    augment = RandAugment(kind, depth=2, severity=9)
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(coarse).repeat_interleave(14, 1).repeat_interleave(14, 2)
    draws = augment.draw(random, 64, 224)
    on_gpu = images.to(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = augment_batch(on_gpu, draws, (0, 0, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (augmented.cpu().int() - augment_batch(images, draws, (0, 0, 0)).int()).abs()
    record[f"randaugment_{kind}"] = {
        "mean_difference": difference.double().mean().item(),
        "pixels_more_than_a_level_apart": (difference > 1).double().mean().item(),
    }
    assert (difference > 1).double().mean() < 0.02  # a level before equalize is several after it
    assert difference.double().mean() < 0.1


def test_a_loader_applies_randaugment_on_the_gpu(tmp_path: Path) -> None:
    """Crop and mirror as without it, then the drawn operations, as Pillow does them."""
    pytest.importorskip("nvidia.dali")
    photos = save_photos(tmp_path, 0)
    plain = train_transform(64)
    augmented = train_transform(64, RandAugment("composer", depth=1, severity=9))
    levels = []
    for transform in (plain, augmented):
        loader = make_loader(
            "dali", photos, transform, batch_size=12, device=CUDA, threads=2, decode="cpu"
        )
        images = next(loader.batches([Request(range(12), 3)])).images.cpu()
        assert images.is_contiguous()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
        levels.append((255 * (images * std + mean)).round().to(torch.uint8))
        loader.close()
    draws = draw(augmented, 3, 12).randaugment
    assert draws is not None
    for row, (crop, image) in enumerate(zip(*levels, strict=True)):
        before = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
        expected = torch.from_numpy(np.array(augment_image(before, draws, row, (0, 0, 0))))
        difference = (image.permute(1, 2, 0).int() - expected.int()).abs()
        assert difference.double().mean() < 0.5


# The paper's networks


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["vit_b16", "resnet152"])
def test_the_papers_networks_train(
    record: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, precision: str
) -> None:
    """Two workers, 15 steps of 2 x 2 micro-batches of 32 images; the last 5 are measured."""
    images = torch.randn(64, 3, 224, 224, device=CUDA)
    labels = torch.arange(64, device=CUDA) * 15  # of 1000 classes

    def resident(requests: Iterable[Request]) -> Iterator[Batch]:
        for _ in requests:
            yield Batch(images, labels)

    setup = Setup(
        # longer than the session, whose end is therefore no evaluation of the small images
        Plan(ConstantSchedule(1e-4 if name == "vit_b16" else 0.01, 64), ConstantRule(5)),
        global_batch=128,
        micro_batch=32,
        samples=128,
        net=lambda: build_model(ModelConfig(name, None, channels_last=True), 1000, 224),  # type: ignore[arg-type]
        optimizer=adamw() if name == "vit_b16" else sgd(momentum=0.9, weight_decay=1e-4),
        precision=precision,
        stop_after=15,
        folder=tmp_path,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rig = build(setup, device=CUDA)
    assert isinstance(rig.loader, MemoryLoader)
    monkeypatch.setattr(rig.loader, "batches", resident)
    rig.trainer.train()
    rows = [row for row in rig.tracker.rows if row["kind"] == "train"]
    record[f"{name}_{precision}"] = {
        "losses": [row["loss"] for row in rows],
        "images_per_second": rows[-1]["images_per_second"],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "skipped_updates": rig.trainer.progress.skipped_updates,
        "repeated_batches": rig.trainer.progress.repeated_batches,
        "workers": 2,
        "micro_batch": 32,
    }
    shutil.rmtree(tmp_path / "checkpoints")  # gigabytes
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert rig.trainer.progress.averages == 3
    assert torch.equal(rig.parameters(0), rig.parameters(1))
    assert rig.parameters().isfinite().all()
    assert rows[0]["loss"] == pytest.approx(math.log(1000), abs=1.5)
    assert rows[-1]["loss"] < rows[0]["loss"]  # the same 64 images in every step
    assert rig.trainer.progress.skipped_updates == 0  # fp16 repeats what overflows at the start


def test_the_papers_vit_is_timed_for_plans(record: Record) -> None:
    settings = ["model=vit_b16", "data=imagenet", "optimizer=adamw", "precision=fp16"]
    run = ["workers=1", "global_batch=64", "micro_batch=32", "epochs=1", "schedule.peak_lr=0.1"]
    config = load_config([*settings, *run, "sync=constant", "sync.h=4", "cluster.device=cuda"])
    found = measure(config, 1000, 1_281_167, "a test")
    record["calibrate"] = {found.key: found.seconds_per_image, "how": found.how}
    assert found.key == "vit_b16@224/fp16"
    assert torch.cuda.get_device_name() in found.how
    # 3 x 17.6 GFLOPs (multiply-adds) an image: no GPU does 10^17 operations a second yet
    assert found.seconds_per_image > 3 * 2 * 17.6e9 / 1e17
