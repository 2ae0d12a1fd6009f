"""How averages grow with the number of workers: measured up to 8, and the cost model on more.

    python scripts/bench.py scale

All-reduces of one flat float32 tensor over 2, 4 and 8 ranks on this machine's loopback. The cost
model's formula is fitted to each (qsr.core.cost.fit_link), and to 2 and 4 ranks together: what
that says of 8 stands beside what they took. Here 8 ranks share the cores of one machine, so that
not only the way between them gets longer, as between machines, but also each one's part of the
cores smaller: the formula knows nothing of that.

Then the cost model alone: one average of ViT-B/16 and of ResNet-152 over 2 to 4,096 workers, and
the steps that a run with QSR loses to averages, in all and for each 1,000 steps. Assumed is that

- a step takes as long as on the paper's GPUs (configs/speed/paper_2x8.yaml; that of ResNet-152 is
  unverified), with the local batch of 256, however many workers there are;
- the number of steps and the plan stay those of the paper's run with 16 workers;
- 8 workers share the link of a machine; 2 and 8 workers, on a single one, take as long as over it;
- a link gives the bandwidth that it is named by (the paper's: fitted), between any number of
  machines, and has the latency that it is named with;
- nobody waits for the slowest, and nothing hides an average.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.measure import record, summary
from qsr.cluster.group import join_process_group
from qsr.cluster.place import find_place
from qsr.cluster.processes import start_ranks
from qsr.config.load import load_config
from qsr.core.cost import Link, fit_link, ring_bytes
from qsr.planner.cost_model import parameter_bytes, speed_key
from qsr.planner.forecast import forecast
from qsr.sync.topology import Topology

RANKS = (2, 4, 8)
SIZES_BYTES = (2**12, 2**16, 2**20, 2**22, 2**24)
REPETITIONS = 30

WORKERS = (2, 8, 16, 64, 256, 1024, 4096)
WORKERS_PER_MACHINE = 8
LINKS = {
    "paper's 2 x 8, fitted; 50 us": (None, 50e-6),
    "100 Gbit/s, 10 us": (100.0, 10e-6),
    "400 Gbit/s, 5 us": (400.0, 5e-6),
}
"""Link of a machine -> Gbit/s per direction (None: as in the paper's profile), and the latency of a
message in seconds."""
RUNS = {
    "ViT-B/16": "vit_b16_b4096/quadratic_h4",
    "ResNet-152": "resnet152_b4096/quadratic_h4",
}


def measure_rank(ranks: int) -> dict[int, list[float]]:
    """Collective: size -> seconds of each all-reduce on the slowest rank."""
    torch.set_num_threads(1)
    place = find_place()
    here = Topology(place.rank, ranks, place.local_rank, ranks)
    communicator = join_process_group(here, torch.device("cpu"), timeout_seconds=600.0)
    found = {}
    for size in SIZES_BYTES:
        tensor = torch.zeros(size // 4)
        seconds = []
        for _ in range(3 + REPETITIONS):
            before = communicator.seconds()
            communicator.barrier()
            communicator.sum_(tensor)
            seconds.append(communicator.seconds() - before)
        rows = communicator.gather_floats(seconds[3:])
        found[size] = [max(column) for column in zip(*rows, strict=True)]
    return found


def fit_together(medians: dict[int, dict[int, float]], ranks: tuple[int, ...]) -> Link:
    """Fit one latency and bandwidth to several numbers of ranks, by least squares on the relative
    error as in fit_link. The returned link has the largest number of ranks."""
    rows = [
        (Link(n, 1, math.inf, 1.0).seconds(0) / seconds, ring_bytes(n, size) / seconds)
        for n in ranks
        for size, seconds in medians[n].items()
    ]
    (latency, per_byte), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return Link(max(ranks), 1, 1 / float(per_byte), float(latency))


def measured() -> dict[str, Any]:
    """Measured all-reduces on this machine, and the fitted formula."""
    found = {ranks: start_ranks(measure_rank, ranks, ranks) for ranks in RANKS}
    seconds = {
        n: {size: summary(values) for size, values in by_size.items()}
        for n, by_size in found.items()
    }
    medians = {
        n: {size: about["median"] for size, about in by_size.items()}
        for n, by_size in seconds.items()
    }
    fits = {n: fit_link(n, 1, SIZES_BYTES, [*medians[n].values()]) for n in RANKS}
    *fewer, most = RANKS
    both = fit_together(medians, tuple(fewer))
    expected = Link(most, 1, both.bytes_per_second, both.latency_seconds)
    return {
        "sizes_bytes": SIZES_BYTES,
        "seconds": {n: [*by_size.values()] for n, by_size in seconds.items()},
        "fits": {
            n: {**constants(link), "relative_error": error} for n, (link, error) in fits.items()
        },
        "extrapolated": {
            "fitted_to_ranks": fewer,
            **constants(both),
            "ranks": most,
            "predicted_seconds": [expected.seconds(size) for size in SIZES_BYTES],
            "deviation": [medians[most][s] / expected.seconds(s) - 1 for s in SIZES_BYTES],
        },
    }


def constants(link: Link) -> dict[str, float]:
    """The constants of the formula."""
    return {
        "latency_seconds": link.latency_seconds,
        "gbit_per_second": 8 * link.bytes_per_second / 1e9,
    }


def modelled() -> Iterator[dict[str, Any]]:
    """One row per network, link and number of workers."""
    for network, experiment in RUNS.items():
        config = load_config([f"experiment={experiment}", "speed=paper_2x8"])
        speed, run = config.speed, forecast(config)
        assert speed is not None
        step_seconds = speed.seconds_per_image[speed_key(config)] * config.local_batch
        steps, rounds = run.plan.total_steps, run.plan.num_rounds
        for name, (nominal, latency) in LINKS.items():
            gbit_per_second = nominal or speed.link_gbit_per_second
            assert gbit_per_second is not None
            for workers in WORKERS:
                machines = math.ceil(workers / WORKERS_PER_MACHINE)
                link = Link(workers, machines, gbit_per_second * 1e9 / 8, latency)
                average = link.seconds(parameter_bytes(run.parameters))
                yield {
                    "network": network,
                    "parameters": run.parameters,
                    "link": name,
                    "gbit_per_second": gbit_per_second,
                    "latency_seconds": latency,
                    "workers": workers,
                    "machines": machines,
                    "step_seconds": step_seconds,
                    "steps": steps,
                    "rounds": rounds,
                    "average_seconds": average,
                    "steps_lost": rounds * average / step_seconds,
                    "steps_lost_per_1000": 1000 * rounds / steps * average / step_seconds,
                    "steps_lost_per_1000_data_parallel_blocking": 1000 * average / step_seconds,
                }


def main() -> int:
    here, rows = measured(), list(modelled())
    for ranks in RANKS:
        times = "  ".join(f"{1e3 * about['median']:8.2f}" for about in here["seconds"][ranks])
        fit = here["fits"][ranks]
        print(
            f"{ranks} ranks, ms: {times}   fit {1e6 * fit['latency_seconds']:.0f} us, "
            f"{fit['gbit_per_second']:.1f} Gbit/s, error {100 * fit['relative_error']:.0f} %"
        )
    deviations = "  ".join(f"{100 * d:+7.0f}%" for d in here["extrapolated"]["deviation"])
    print(f"{RANKS[-1]} ranks, relative to the formula fitted to fewer: {deviations}")
    for row in rows:
        print(
            f"{row['network']:10} {row['link']:28} {row['workers']:5} workers: "
            f"{1e3 * row['average_seconds']:6.1f} ms per average, QSR loses "
            f"{row['steps_lost']:6.0f} of {row['steps']:,} steps, "
            f"{row['steps_lost_per_1000']:5.1f} in 1,000"
        )
    results = {"about": __doc__, "measured": here, "modelled": rows}
    print(record("scale", results, max(RANKS)))
    return 0


if __name__ == "__main__":
    from benchmarks import scale  # not __main__, so that ranks can import its functions

    sys.exit(scale.main())
