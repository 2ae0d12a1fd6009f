"""A calibration on real processes."""

import os
from typing import Any

from qsr.config.load import load_config
from qsr.planner.calibrate import Calibration
from tests.support import run_ranks

SETTINGS = (
    *("experiment=demo/quadratic", "workers=2", "ranks_per_worker=2", "cluster.threads_per_rank=1"),
    *("data.classes=10", "data.train_images=1442"),
)


def calibrate(rank: int, ranks: int, on_a_machine: int) -> Any:
    os.environ["LOCAL_WORLD_SIZE"] = str(on_a_machine)
    calibration = Calibration(load_config(SETTINGS), 10, 1442)
    calibration.time_steps()
    calibration.time_allreduces()
    found = calibration.measurement("a test", 1)
    return (
        (found.machines, found.ranks_per_machine),
        found.sizes_bytes,
        (found.allreduce_seconds, found.inside_seconds),
        found.data_parallel,
    )


def test_links_between_and_within_two_machines_are_measured() -> None:
    results = run_ranks(calibrate, 4, 2)
    assert results == [results[0]] * 4  # times are those of the slowest rank
    machines, sizes, (between, inside), steps = results[0]
    assert machines == (2, 2)
    assert len(sizes) == len(between) == len(inside)
    assert min(*between, *inside) > 0
    # each rank counts as a worker of its own: 16 images, one replica
    assert (steps.ranks, steps.images, steps.micro_batches) == (4, 16, 1)
    assert steps.overlapped_seconds > 0


def test_on_one_machine_there_is_one_kind_of_link() -> None:
    machines, _, (between, inside), _ = run_ranks(calibrate, 4, 4)[0]
    assert machines == (1, 4)
    assert min(between) > 0
    assert inside == ()
