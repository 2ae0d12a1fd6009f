"""Where QSR pays: time per step against data parallel training, over links, workers and GPUs.

All times are predicted, from the profile that was fitted to the paper's smaller cluster and from
the assumptions that `assumptions` lists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from qsr.config.load import load_config
from qsr.config.planning import make_plan, parameter_count
from qsr.core.cost import CostModel, Link
from qsr.planner.cost_model import make_cost_model, speed_key
from qsr.planner.forecast import is_unverified, known_classes, known_images

RANKS_PER_MACHINE = 8
WORKERS = (16, 64, 256, 1024, 4096)
LINKS_GBIT_PER_SECOND = (1, 2.5, 5, 10, 25, 50, 100, 200, 400)
LATENCY_SECONDS = 20e-6
GPUS = {"the paper's GPU": 1, "a GPU 10 times as fast": 10}
"""Speed relative to the GPU that the profile was fitted to."""

_RECIPE = (
    *("data=imagenet", "speed=paper_2x8", "precision=fp16"),
    *("global_batch=4096", "workers=16", "sync=quadratic", "sync.h_base=4"),
)
_VIT = (
    *("model=vit_b16", "optimizer=adamw", "epochs=300", "micro_batch=128", "sync.alpha=0.0175"),
    *("schedule.peak_lr=0.008", "schedule.warmup_steps=10000"),
)
_RESNET = (
    *("model=resnet152", "epochs=200", "micro_batch=32", "sync.alpha=0.25"),
    *("schedule.peak_lr=0.8", "schedule.warmup_epochs=5"),
)
# parameters and GFLOPs (multiply-adds) per image of 224 pixels, from torchvision's model cards
_VIT_B_GFLOPS = 17.564
_LARGER = {"ViT-L/16": (304_326_632, 61.555), "ViT-H/14": (632_045_800, 167.295)}


@dataclass(frozen=True)
class Network:
    """A network in the paper's recipe, on the paper's GPU."""

    name: str
    model: CostModel
    """The cost model for one worker per rank; its all-reduce is replaced."""
    volume: float
    """Communication volume of QSR."""
    assumption: str
    """Where its size and speed come from."""
    unverified: bool
    """Whether its speed is unverified."""


@dataclass(frozen=True)
class Case:
    """Seconds per step of one network on one cluster."""

    network: str
    unverified: bool
    """Whether the network's speed is unverified."""
    gpu: str
    workers: int
    link_gbit_per_second: float
    compute_seconds: float
    allreduce_seconds: float
    blocking_seconds: float
    overlapped_seconds: float
    qsr_seconds: float

    @property
    def saved_of_blocking(self) -> float:
        """Share of the time of blocking data parallel training that QSR saves; may be negative."""
        return 1 - self.qsr_seconds / self.blocking_seconds

    @property
    def saved_of_overlapped(self) -> float:
        """The same for overlapped data parallel training."""
        return 1 - self.qsr_seconds / self.overlapped_seconds


@cache
def networks() -> tuple[Network, ...]:
    """The paper's ViT-B and ResNet-152, and larger transformers."""
    vit, resnet = _recipe("ViT-B/16", _VIT), _recipe("ResNet-152", _RESNET)
    larger = [
        Network(
            name,
            replace(
                vit.model,
                compute_seconds=vit.model.compute_seconds * gflops / _VIT_B_GFLOPS,
                parameter_bytes=4 * parameters,
            ),
            vit.volume,
            f"{parameters:,} parameters and {gflops} GFLOPs per image (torchvision's model card); "
            f"assumed to take as long per FLOP, and to be trained, as ViT-B/16",
            vit.unverified,
        )
        for name, (parameters, gflops) in _LARGER.items()
    ]
    return (vit, *larger, resnet)


def _recipe(name: str, settings: Sequence[str]) -> Network:
    config = load_config([*_RECIPE, *settings])
    speed = config.speed
    assert speed is not None  # the paper's profile has one
    model = make_cost_model(config, parameter_count(config.model, known_classes(config)))
    source = speed.sources[speed_key(config)]
    return Network(
        name,
        model,
        make_plan(config, known_images(config)).volume,
        f"seconds per image {source}",
        is_unverified(source),
    )


def case(network: Network, gpu: str, workers: int, link_gbit_per_second: float) -> Case:
    """One network on `workers` ranks, RANKS_PER_MACHINE to a machine."""
    link = Link(
        workers, workers // RANKS_PER_MACHINE, link_gbit_per_second * 1e9 / 8, LATENCY_SECONDS
    )
    compute = network.model.compute_seconds / GPUS[gpu]
    model = replace(network.model, allreduce=link, compute_seconds=compute)
    return Case(
        network=network.name,
        unverified=network.unverified,
        gpu=gpu,
        workers=workers,
        link_gbit_per_second=link_gbit_per_second,
        compute_seconds=compute,
        allreduce_seconds=model.gradient_seconds,
        blocking_seconds=compute + model.gradient_seconds,
        overlapped_seconds=compute + model.exposed_gradient_seconds,
        qsr_seconds=compute + network.volume * model.average_seconds,
    )


def all_cases() -> Iterator[Case]:
    """Every network on every cluster."""
    for network in networks():
        for gpu in GPUS:
            for workers in WORKERS:
                for link in LINKS_GBIT_PER_SECOND:
                    yield case(network, gpu, workers, link)


def assumptions() -> list[str]:
    """The assumptions behind the cases, one line each."""
    shared = [
        "QSR: H_base 4 and the paper's alpha / peak rate at a global batch of 4,096, whose volume "
        "is taken for every number of workers: "
        + ", ".join(f"{n.name} {100 * n.volume:.1f} %" for n in networks()),
        "local batch 256, in as many micro-batches as in the paper's recipes (ResNet-152: 8, "
        "ViT: 2); overlapped: DDP hides all-reduces behind the last one's backward pass, which is "
        "not slowed down",
        f"{RANKS_PER_MACHINE} ranks to a machine; the link is the effective bandwidth of a machine "
        f"per direction, with {LATENCY_SECONDS * 1e6:.0f} microseconds per message (assumed)",
        "GPU 1x: the paper's, as fitted to its ViT-B times; 10x: 10 times as fast (assumed)",
        "left out: stragglers, which cost data parallel training more, and a bandwidth that falls "
        "with the number of machines, as it does from the paper's 2 x 8 to its 8 x 8",
    ]
    return [*shared, *(f"{network.name}: {network.assumption}" for network in networks())]
