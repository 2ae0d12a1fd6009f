"""The paper's headline on a slow link: what does QSR save when all-reduces take a given share?

    python scripts/bench.py slow_link

Two machines with one rank each, simulated with network namespaces and joined by a link whose rate
is set so that blocking data parallel training spends a given share of its time in all-reduces: 27 %
and 43 % are those of the paper's clusters with 2 x 8 and 8 x 8 GPUs. Part of that time is spent
waiting for the slower rank; this part remains without a rate limit. On each link one launch trains
with every method through the trainer, repeatedly. Each measured time is reported with the planner's
prediction. On a shared machine the time of a step can change by a tenth within seconds, so the
calibration of a run (as in scripts/plan.py) uses steps right before and after it, and the results
are medians over the repetitions.

The network is a small version of the paper's vision transformer, and DDP's buckets of 25 MiB are
scaled down with it: with torch's default size there would be a single bucket and nothing to
overlap. The runs are short, so QSR's volume is 13 % instead of 10.4 %. Images are decoded in
advance: with a GPU the host does that in parallel, but here it would take cores from training. Only
overlapped data parallel training is not to scale: its all-reduces need the cores too, unlike on a
GPU, and slow down the backward pass. Needs root, ip and tc; otherwise nothing is measured.
"""

import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import ROOT, ratio, record, summary
from benchmarks.network import (
    MACHINES,
    PACKET_BYTES,
    PAYLOAD_BYTES,
    Network,
    missing_reason,
    put_network_first,
)
from qsr import build
from qsr.config.load import load_config
from qsr.config.planning import make_plan, parameter_count
from qsr.config.schema import Config, ModelConfig
from qsr.core import cost
from qsr.data import Batch, EvalTransform, ImageFolder, Request, make_loader
from qsr.data.prepare.digits import prepare_digits
from qsr.errors import ConfigError
from qsr.planner.calibrate import Calibration
from qsr.planner.forecast import forecast, known_classes, known_images
from qsr.planner.profiles import Measurement, updated_profile

PEAK_LR = 0.004
BLOCKING = "data parallel, blocking"
QSR = ("experiment=demo/quadratic", f"sync.alpha={0.0175 / 0.008 * PEAK_LR}")
METHODS = {
    BLOCKING: ("experiment=demo/parallel", "cluster.overlap_gradients=false"),
    "data parallel, overlapped": ("experiment=demo/parallel",),
    "constant H = 4": ("experiment=demo/constant",),
    "QSR": QSR,
    "QSR, 3 steps late": (*QSR, "sync.delay_steps=3"),
}
"""Method -> settings; H_base and alpha / peak rate are those of the paper's ViT-B."""

SHARES = (0.10, 0.27, 0.43, 0.70)
"""Shares of the blocking method's time in all-reduces, from a fast link to a slow one. The link
without a limit, which gives the smallest possible share, is measured first."""
PUBLISHED = {0.27: 20.2 / 26.7, 0.43: 5.5 / 8.6}
"""The paper's time with QSR relative to blocking data parallel (abstract), on 2 x 8 and 8 x 8
GPUs."""
REPETITIONS = 3
"""Repetitions of all methods on each link."""
SOURCE = "bench.py slow_link"
TRIES = 5
"""Maximum number of attempts to measure plausible all-reduce times."""

SETTINGS = (
    f"workers={MACHINES}",
    "global_batch=48",
    "epochs=2",
    "model=small_vit",
    "optimizer=adamw",
    f"schedule.peak_lr={PEAK_LR}",
    "schedule.warmup_epochs=null",
    "schedule.warmup_steps=6",
    "evaluation.every_epochs=1000",
    "evaluation.batchnorm_micro_batches=2",
    "checkpoint.every_steps=null",
    "cluster.device=cpu",
    "cluster.threads_per_rank=1",
    "tracking=none",
    "tracking.progress=false",
)


Found = dict[str, tuple[dict[str, Any], Measurement]]
"""Method -> the summary of its run, and the calibration around the run."""


def bucket_mib(parameters: int) -> float:
    """Bucket size in MiB that is as large relative to this network as 25 MiB is to ViT-B/16."""
    vit = parameter_count(ModelConfig("vit_b16", None, channels_last=False), 1000)
    return 25 * parameters / vit


class MemoryLoader:
    """Serves images decoded in advance: consecutive ones, from a request's first index on."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            size = len(request.indices)
            start = request.indices[0] % (len(self._images) - size + 1)
            yield Batch(self._images[start : start + size], self._labels[start : start + size])

    def close(self) -> None:
        """Nothing to close."""


@functools.cache
def decoded(dataset: ImageFolder, transform: EvalTransform) -> MemoryLoader:
    """All images of a data set, in memory."""
    size = len(dataset)
    loader = make_loader(
        "auto", dataset, transform, batch_size=size, device=torch.device("cpu"), threads=1
    )
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(1)).tolist()
    (batch,) = loader.batches([Request(shuffled, 0)])
    images, labels = batch.images.clone(), batch.labels.clone()
    loader.close()
    return MemoryLoader(images, labels)


def load_from_memory(config: Config) -> None:
    """Make training in this process use images decoded in advance, so that decoding takes no
    cores."""
    transform = EvalTransform.of(config.data)
    patch.object(
        build, "open_loader", lambda _, dataset, *__, **___: decoded(dataset, transform)
    ).start()


def measure_rank(configs: Mapping[str, Config], repetitions: int) -> list[Found]:
    """Collective: repeatedly run every method, with a block of calibration steps before and after
    each run."""
    load_from_memory(configs[BLOCKING])
    results = []
    # warm-up: the first steps of a process are slower
    first = configs[BLOCKING]
    build.run(replace(first, runs_dir=f"{first.runs_dir}/first", stop_after_steps=20))
    put_network_first()
    for number in range(repetitions):
        calibration = Calibration(first, known_classes(first), known_images(first))
        calibration.time_steps()
        time_allreduces(calibration, first)
        found: Found = {}
        # alternate the order, so that a machine that slows down affects all methods equally
        order = list(configs.items())[:: -1 if number % 2 else 1]
        for name, config in order:
            outcome = build.run(replace(config, runs_dir=f"{config.runs_dir}/{number}/{name}"))
            assert isinstance(outcome, dict)  # not stopped
            calibration.time_steps()
            found[name] = (outcome, calibration.measurement(SOURCE, blocks=2))
        results.append(found)
    return results


def time_allreduces(calibration: Calibration, config: Config) -> None:
    """Collective: measure all-reduces, and repeat if the result is implausible, because without a
    rate limit the times of different sizes hardly differ."""
    for _ in range(TRIES):
        calibration.time_allreduces()
        try:
            updated_profile("measured", None, calibration.measurement(SOURCE, blocks=1))
            return
        except ConfigError as error:  # on all ranks alike
            reason = str(error)
            print(f"rank 0: {reason}", file=sys.stderr)
    raise RuntimeError(f"{TRIES} measurements of all-reduces were implausible: {reason}")


def rate_for(share: float, unlimited: Sequence[Found]) -> float | None:
    """The rate in bits/s at which all-reduces take `share` of the time. None if they take longer
    even without a limit, according to `unlimited`."""
    blocking = [found[BLOCKING][0] for found in unlimited]
    calibrations = [found[BLOCKING][1] for found in unlimited]
    steps = blocking[0]["averages"]
    waiting: float = statistics.median(each["communication_seconds"] / steps for each in blocking)
    total: float = statistics.median(each["train_seconds"] / steps for each in blocking)
    seconds = share / (1 - share) * (total - waiting) - waiting
    if seconds <= 0:
        return None
    sent = cost.ring_bytes(MACHINES, calibrations[0].sizes_bytes[-1]) * PACKET_BYTES / PAYLOAD_BYTES
    allreduce = statistics.median(each.allreduce_seconds[-1] for each in calibrations)
    return 8 * sent / (seconds + allreduce)


def predict(config: Config, found: Measurement) -> cost.RunCost:
    """The planner's prediction for a run, from a calibration."""
    speed = updated_profile("measured", None, found)
    predicted = forecast(replace(config, speed=speed)).planned.cost
    assert predicted is not None  # the profile has speeds
    return predicted


def compare(configs: Mapping[str, Config], repetitions: Sequence[Found]) -> dict[str, Any]:
    """Method -> measured and predicted times."""
    methods = {}
    runs = {name: [found[name][0] for found in repetitions] for name in configs}
    costs = {n: [predict(c, found[n][1]) for found in repetitions] for n, c in configs.items()}
    seconds = {name: [run["train_seconds"] for run in runs[name]] for name in configs}
    predicted = {name: [each.total_seconds for each in costs[name]] for name in configs}
    blocking = configs[BLOCKING]
    for name, config in configs.items():
        # unknown for overlapped DDP
        own = [run.get("communication_seconds", math.nan) for run in runs[name]]
        methods[name] = {
            "seconds": summary(seconds[name]),
            "predicted_seconds": summary(predicted[name]),
            "ratio_to_prediction": ratio(seconds[name], predicted[name]),
            "relative": ratio(seconds[name], seconds[BLOCKING]),
            "predicted_relative": ratio(  # with the same calibration
                predicted[name],
                [predict(blocking, found[name][1]).total_seconds for found in repetitions],
            ),
            "communication_seconds": None if math.isnan(own[0]) else summary(own),
            "predicted_communication_seconds": summary(
                [each.communication_seconds for each in costs[name]]
            ),
            "averages": runs[name][0]["averages"],
            "h": [round_.length for round_ in make_plan(config, known_images(config)).rounds()],
        }
    return methods


def main() -> int:
    reason = missing_reason()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="qsr-slow-link-") as folder, Network() as network:
        data = ROOT / "data" / "digits"
        prepare_digits(data)
        settings = [*SETTINGS, f"data.root={data}", f"runs_dir={folder}"]
        first = load_config([*METHODS[BLOCKING], *settings])
        parameters = parameter_count(first.model, known_classes(first))
        settings.append(f"cluster.bucket_mib={bucket_mib(parameters):.6f}")
        configs = {name: load_config([*own, *settings]) for name, own in METHODS.items()}
        blocking = configs[BLOCKING]

        def measure_here(share: float | None, rate: float | None) -> list[Found]:
            here = {n: replace(c, runs_dir=f"{folder}/{share}") for n, c in configs.items()}
            results = network.call(measure_rank, here, REPETITIONS)
            rows.append(describe(share, rate, here, results))
            print_row(rows[-1])
            return results

        rows: list[dict[str, Any]] = []
        unlimited = measure_here(None, None)
        for share in SHARES:
            rate = rate_for(share, unlimited)
            if rate is None:
                print(
                    f"{100 * share:.0f} % requested: all-reduces take longer even without a limit"
                )
                continue
            network.limit(rate)
            measure_here(share, rate)
    about = {
        "model": blocking.model.name,
        "parameters": parameters,
        "image_size": blocking.data.image_size,
        "local_batch": blocking.local_batch,
        "steps": make_plan(blocking, known_images(blocking)).total_steps,
        "bucket_mib": blocking.cluster.bucket_mib,
        "shares": rows,
    }
    print(record("slow_link", about, MACHINES))
    return 0


def describe(
    share: float | None,
    rate: float | None,
    configs: Mapping[str, Config],
    repetitions: Sequence[Found],
) -> dict[str, Any]:
    """The results on one link."""
    batch = configs[BLOCKING].local_batch
    blocking = [found[BLOCKING][0] for found in repetitions]
    calibrations = [calibration for found in repetitions for _, calibration in found.values()]
    return {
        "share": share,
        "measured_share": summary(
            [each["communication_seconds"] / each["train_seconds"] for each in blocking]
        ),
        "rate_mbit_per_second": None if rate is None else rate / 1e6,
        "compute_seconds": summary([batch * each.seconds_per_image for each in calibrations]),
        "allreduce_seconds": summary([each.allreduce_seconds[-1] for each in calibrations]),
        "published_relative": None if share is None else PUBLISHED.get(share),
        "methods": compare(configs, repetitions),
    }


def print_row(row: Mapping[str, Any]) -> None:
    share, rate = row["share"], row["rate_mbit_per_second"]
    published = row["published_relative"]
    print(
        f"{'minimum' if share is None else f'{100 * share:.0f} %'} requested, "
        f"{100 * row['measured_share']['median']:.1f} % measured: "
        f"{'no limit' if rate is None else f'{rate:.0f} Mbit/s'}, "
        f"{1e3 * row['compute_seconds']['median']:.1f} ms per step, "
        f"{1e3 * row['allreduce_seconds']['median']:.1f} ms per all-reduce"
        + (f"; the paper's QSR: {published:.3f}" if published else ""),
        flush=True,
    )
    for name, about in row["methods"].items():
        print(
            f"  {name:28} {about['seconds']['median']:6.2f} s, predicted "
            f"{about['predicted_seconds']['median']:6.2f} s, "
            f"{100 * (about['ratio_to_prediction']['median'] - 1):+5.1f} %; relative "
            f"{about['relative']['median']:.3f}, predicted "
            f"{about['predicted_relative']['median']:.3f}; {about['averages']} averages",
            flush=True,
        )


if __name__ == "__main__":
    from benchmarks import slow_link  # not __main__, so that ranks can import its functions

    sys.exit(slow_link.main())
