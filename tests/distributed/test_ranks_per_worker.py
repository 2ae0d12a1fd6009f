"""Workers that are made of several ranks each, which train data parallel among themselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsr import ConstantRule, Plan, PostLocalRule, SwapRule
from qsr.cluster.group import join_process_group, leave_process_group
from qsr.errors import DisagreementError
from qsr.sync.topology import Topology
from tests.distributed.test_ranks import COSINE, GRADIENTS, QSR, SETUP
from tests.support import (
    CPU,
    Setup,
    adamw,
    build,
    new_folder,
    run_ranks,
    sgd,
    train,
    without_times,
)


def train_rank(rank: int, ranks: int, setup: Setup) -> Any:
    """The worker of this rank, its tensors after the run, and the rows of the log."""
    rig = train(setup, Topology(rank, ranks, rank, setup.workers, ranks // setup.workers))
    (worker,) = rig.workers
    rows = without_times(rig.tracker.rows)
    tensors = {name: t.tolist() for name, t in worker.tensors().items()}
    return worker.index, tensors, rows, rig.trainer.progress.averaged_bytes


def on(ranks: int, setup: Setup) -> list[Any]:
    """The same of every rank; each worker is made of ranks / setup.workers."""
    results = run_ranks(train_rank, ranks, replace(setup, folder=setup.folder or new_folder()))
    assert not any(isinstance(result, str | int) for result in results), results
    return results


def learned(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the running statistics of BatchNorm, which each rank has of its own images."""
    return {name: t for name, t in tensors.items() if not name.startswith("buffers/")}


def test_ranks_workers_parts_and_shards() -> None:
    places = [Topology(rank, 6, rank, 2, 3) for rank in range(6)]
    assert [list(p.workers) for p in places] == [[0], [0], [0], [1], [1], [1]]
    assert [p.part for p in places] == [0, 1, 2, 0, 1, 2]
    assert [list(p.shards) for p in places] == [[0], [1], [2], [3], [4], [5]]
    two = Topology(1, 2, 1, 6)  # three workers on each of two ranks
    assert (list(two.workers), two.part, list(two.shards)) == ([3, 4, 5], 0, [3, 4, 5])


def sum_over_workers(rank: int, ranks: int, size: int, later: bool) -> Any:
    """A sum over three workers of two ranks, and how many elements this rank gave to each
    all-reduce."""
    communicator = join_process_group(Topology(rank, ranks, rank, 3, 2), CPU, 60.0)
    given = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        given.append((len(tensor), dist.get_world_size(options["group"])))
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    try:
        # the same on both ranks of a worker
        tensor = torch.arange(float(size)) * 10 ** (rank // 2)
        if later:
            communicator.begin_sum_(tensor).wait()
        else:
            communicator.sum_(tensor)
    finally:
        dist.all_reduce = all_reduce
    leave_process_group()
    return tensor.tolist(), given


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("size", "given"),
    [(8, [(4, 3)]), (7, [(3, 3), (1, 3)]), (1, [(1, 3)])],
)
def test_each_rank_sums_its_part_with_the_other_workers(
    size: int, given: list[tuple[int, int]], later: bool
) -> None:
    for total, elements in run_ranks(sum_over_workers, 6, size, later):
        assert total == [111.0 * i for i in range(size)]
        assert elements == given


@pytest.mark.parametrize("bucket_mib", [25.0, None], ids=["ddp", "blocking"])
def test_one_worker_of_four_ranks_is_data_parallel_training_bit_for_bit(
    bucket_mib: float | None,
) -> None:
    """Whatever its rule: its rounds end in an average over one worker."""
    setup = replace(SETUP, mixup_alpha=0.2, bucket_mib=bucket_mib)
    parallel = on(4, replace(setup, workers=4, plan=GRADIENTS))
    hybrid = on(4, replace(setup, workers=1))
    for (_, ours, rows, _), (_, theirs, its_rows, _) in zip(hybrid, parallel, strict=True):
        assert ours == theirs
        assert [row["loss"] for row in rows] == [row["loss"] for row in its_rows]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bucket_mib": None},
        {"delay_steps": 1},
        {"optimizer": adamw(clip_norm=1.0), "average_momentum": True},
        {"plan": Plan(COSINE, PostLocalRule(13, 4))},
        {"plan": Plan(COSINE, SwapRule(17))},
        {"plan": GRADIENTS},
    ],
    ids=["ddp", "blocking", "delayed", "moments", "post_local", "swap", "data_parallel"],
)
def test_two_workers_of_two_ranks_are_two_workers_to_rounding(changes: dict[str, Any]) -> None:
    """Without draws and BatchNorm, which each rank has of its own."""
    setup = Setup(QSR, optimizer=sgd(momentum=0.9), noise=0.0, global_batch=16)
    setup = replace(setup, **changes)
    alone = {worker: tensors for worker, tensors, _, _ in on(2, setup)}
    results = on(4, setup)
    assert [worker for worker, *_ in results] == [0, 0, 1, 1]
    for worker, tensors, _, averaged in results:
        for name, values in alone[worker].items():
            torch.testing.assert_close(
                torch.tensor(tensors[name]), torch.tensor(values), rtol=1e-4, atol=1e-5
            )
        parameters = 4 * (108 * 4 + 4)
        assert isinstance(setup.plan, Plan)
        moments = setup.plan.num_rounds * parameters * setup.average_momentum
        assert averaged == setup.plan.num_rounds * parameters + moments


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": Plan(COSINE, PostLocalRule(13, 4))},
        {"plan": Plan(COSINE, ConstantRule(6)), "delay_steps": 3},
        {"optimizer": adamw(), "average_momentum": True, "average_second_moment": True},
    ],
    ids=["local", "post_local", "delayed", "moments"],
)
def test_resumption_in_the_middle_of_a_round_is_bit_exact(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    setup = replace(SETUP, checkpoint_every=7, **changes)
    whole = on(4, setup)
    on(4, replace(setup, stop_after=7, folder=tmp_path))
    (newest,) = (tmp_path / "checkpoints").iterdir()
    files = sorted(path.name for path in newest.glob("worker_*"))
    assert len(files) == 4  # tensors and values of two workers, not of four ranks
    resumed = on(4, replace(setup, folder=tmp_path))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert learned(ours[1]) == learned(theirs[1])
        later = [row for row in theirs[2] if row["step"] > 7]
        assert ours[2] == later  # with every evaluation


def test_the_ranks_of_a_worker_have_the_same_parameters() -> None:
    results = on(4, replace(SETUP, stop_after=7))  # in the middle of a round
    first, also_first, second, also_second = (learned(tensors) for _, tensors, _, _ in results)
    assert first == also_first
    assert second == also_second
    assert first != second


def train_in_fp16(rank: int, ranks: int, workers: int) -> Any:
    setup = replace(SETUP, precision="fp16", workers=workers, net=SETUP.net)
    rig = build(setup, Topology(rank, ranks, rank, workers, ranks // workers))
    for worker in rig.workers:
        worker.scaler.load_state_dict({**worker.scaler.state_dict(), "scale": 2.0**40})
    rig.trainer.train()
    scales = [worker.scaler.get_scale() for worker in rig.workers]
    return scales, rig.trainer.progress.repeated_batches


def test_a_worker_has_one_loss_scale_and_counts_a_repeated_batch_once() -> None:
    one = run_ranks(train_in_fp16, 2, 1)
    ((scale,), repeated) = one[0]
    assert one == [([scale], repeated)] * 2
    # each repeat halves the scale
    assert scale == 2.0 ** (40 - repeated)
    assert repeated > 5


def disagree(rank: int, ranks: int) -> str:
    setup = replace(SETUP, config_hash="another" if rank == 3 else SETUP.config_hash)
    rig = build(setup, Topology(rank, ranks, rank, 2, 2))
    try:
        rig.trainer.train()
    except DisagreementError as error:
        return str(error)
    return "went on"


def test_a_rank_that_disagrees_with_the_rest_of_its_worker_is_noticed() -> None:
    for message in run_ranks(disagree, 4):
        assert "the ranks disagree on config" in message
