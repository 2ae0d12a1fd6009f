"""Real processes that form a gloo group."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import (
    AdaptiveRule,
    ConstantRule,
    CosineSchedule,
    EveryStepRule,
    Plan,
    PostLocalRule,
    QuadraticRule,
)
from qsr.cluster.group import join_process_group
from qsr.config.schema import EmaConfig
from qsr.core.open_plan import OpenPlan
from qsr.core.outer import OuterOptions
from qsr.core.plan import Round
from qsr.core.sampling import Sampler
from qsr.data import Batch, Request
from qsr.errors import TrainingError
from qsr.sync.agreement import MAX_PENDING
from qsr.sync.averaging import Averager
from qsr.sync.batchnorm import reestimate
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers
from qsr.sync.topology import Topology
from tests.support import (
    CPU,
    Setup,
    batchnorm_net,
    build,
    new_folder,
    run_ranks,
    sgd,
    train,
    without_times,
)

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=4, total_steps=24)
QSR = Plan(COSINE, QuadraticRule(h_base=2, alpha=0.15))
GRADIENTS = Plan(COSINE, EveryStepRule("gradients"))


def odd_tensors(rank: int) -> list[torch.Tensor]:
    channels_last = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    return [
        torch.arange(7.0) * (rank + 1),
        channels_last.to(memory_format=torch.channels_last) + rank,
        torch.tensor(float(rank)),
        torch.arange(6, dtype=torch.float64).view(2, 3).t() - rank,
        torch.full((5,), float(rank), dtype=torch.bfloat16),
    ]


def average_odd_tensors(rank: int, ranks: int) -> Any:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    buffers = FlatBuffers(odd_tensors(rank), FINGERPRINT_SIZE)
    mark = Fingerprint(3, 1, 3, 0.1, Sampler(96, 6, 3, seed=1), config="c0ffee")
    Averager(communicator).average_([buffers], mark)
    gathered = communicator.gather_floats([rank, 2.0 * rank])
    flags = [communicator.any(rank == 2), communicator.any(False)]
    seconds = communicator.seconds()
    return [view.tolist() for view in buffers.views], gathered, flags, seconds


def test_averages_by_value_over_three_ranks() -> None:
    mean = [
        torch.stack([odd_tensors(rank)[i] for rank in range(3)]).mean(0).tolist() for i in range(5)
    ]
    for values, gathered, flags, seconds in run_ranks(average_odd_tensors, 3):
        assert values == mean
        assert gathered == [[0, 0], [1, 2], [2, 4]]
        assert flags == [True, False]
        assert seconds > 0.0


def exchange_texts(rank: int, ranks: int) -> Any:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    texts = ["", "zwölf", "x" * 1000]
    gathered = [communicator.gather_texts(texts[rank]), communicator.gather_texts("")]
    done: list[int] = []
    communicator.try_on_all(lambda: done.append(rank))
    refused = []
    for failing in (set(), {2}, {1, 2}):

        def act(failing: set[int] = failing) -> None:
            done.append(rank)
            if rank in failing:
                raise OSError(28, "No space left on device")

        try:
            communicator.try_on_all(act)
        except OSError as error:
            refused.append(str(error))
    return gathered, refused, len(done)


def test_ranks_tell_each_other_texts_and_failures() -> None:
    for gathered, refused, done in run_ranks(exchange_texts, 3):
        assert gathered == [["", "zwölf", "x" * 1000], ["", "", ""]]
        assert refused == [f"rank {rank}: [Errno 28] No space left on device" for rank in (2, 1)]
        assert done == 4


def train_ranks(rank: int, ranks: int, setup: Setup) -> Any:
    """Every worker's tensors after a run, and the rows of the log, of one rank."""
    rig = train(setup, Topology(rank, ranks, rank, setup.workers))
    tensors = {
        worker.index: {name: t.tolist() for name, t in worker.tensors().items()}
        for worker in rig.workers
    }
    return tensors, without_times(rig.tracker.rows)


def on(ranks: int, setup: Setup) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """The same, of all workers of a run on `ranks` processes."""
    setup = replace(setup, folder=setup.folder or new_folder())
    if ranks == 1:
        tensors, rows = train_ranks(0, 1, setup)
        return tensors, rows
    results = run_ranks(train_ranks, ranks, setup)
    assert not any(isinstance(result, str | int) for result in results), results
    return {k: v for tensors, _ in results for k, v in tensors.items()}, results[0][1]


SETUP = Setup(QSR, net=batchnorm_net, optimizer=sgd(momentum=0.9), evaluate_every=7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"delay_steps": 1},
        {"outer": OuterOptions(lr=0.7, momentum=0.9, nesterov=True)},
        {"plan": GRADIENTS},
        {"plan": GRADIENTS, "bucket_mib": None},
    ],
    ids=["local", "delayed", "outer", "data_parallel", "blocking_data_parallel"],
)
def test_two_virtual_workers_are_two_processes_bit_for_bit(changes: dict[str, Any]) -> None:
    setup = replace(SETUP, mixup_alpha=0.2, micro_batch=2, **changes)
    virtual, rows = on(1, setup)
    processes, process_rows = on(2, setup)
    assert virtual == processes
    for ours, theirs in zip(process_rows, rows, strict=True):
        # not to the bit: the ranks' statistics of BatchNorm are pooled in another order
        assert ours == pytest.approx(theirs, rel=1e-6)


def adaptive_rounds(rank: int, ranks: int) -> Any:
    """Rounds and losses of four workers, and the sum and number of losses of a round begun."""
    plan = OpenPlan(COSINE, AdaptiveRule(5))
    setup = replace(SETUP, plan=plan, workers=4, folder=None, stop_after=22, micro_batch=1)
    train(setup, Topology(rank, ranks, rank, 4))
    return plan.losses, [(r.start, r.length) for r in map(plan.round_at, (0, 5, 21))]


def test_rounds_that_follow_the_loss_are_the_same_on_all_ranks() -> None:
    losses, rounds = adaptive_rounds(0, 1)
    for ranks in (2, 4):
        first, *others = run_ranks(adaptive_rounds, ranks)
        assert all(other == first for other in others)
        assert first[0] == pytest.approx(losses, rel=1e-5)
        assert first[1] == rounds


@pytest.mark.parametrize("plan", [QSR, GRADIENTS], ids=["local", "data_parallel"])
def test_four_workers_on_one_two_and_four_ranks_agree_to_rounding(plan: Plan) -> None:
    setup = replace(SETUP, plan=plan, workers=4, net=batchnorm_net)
    reference, _ = on(1, setup)
    for ranks in (2, 4):
        result, _ = on(ranks, setup)
        for worker in range(4):
            for name, values in reference[worker].items():
                torch.testing.assert_close(
                    torch.tensor(result[worker][name]),
                    torch.tensor(values),
                    rtol=1e-4,
                    atol=1e-5,
                )


def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """K workers are the same run on any ranks: two processes go on with what one began."""
    setup = replace(SETUP, checkpoint_every=5)
    whole, _ = on(1, setup)
    on(1, replace(setup, stop_after=11, folder=tmp_path))
    resumed, _ = on(2, replace(setup, folder=tmp_path))
    assert resumed == whole


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": GRADIENTS},
        {"plan": Plan(COSINE, PostLocalRule(13, 4))},
        {"plan": Plan(COSINE, ConstantRule(6)), "delay_steps": 3},
    ],
    ids=["local", "ddp", "post_local", "delayed"],
)
def test_four_ranks_resume_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """With two ranks any order of addition gives the same sum; with four it does not."""
    setup = replace(SETUP, workers=4, checkpoint_every=7, **changes)
    whole, _ = on(4, setup)
    on(4, replace(setup, stop_after=7, folder=tmp_path))
    resumed, _ = on(4, replace(setup, folder=tmp_path))
    assert resumed == whole


def train_beside_a_slow_rank(rank: int, ranks: int, setup: Setup, folder: Path) -> list[int]:
    """Rank 1 does not begin its sixth step before rank 0 has begun its fourteenth."""
    rig = build(setup, Topology(rank, ranks, rank, setup.workers))
    deliver = rig.loader.batches

    def batches(requests: Iterable[Request]) -> Iterator[Batch]:
        for number, batch in enumerate(deliver(requests)):
            if rank == 0 and number == 5 + MAX_PENDING:
                (folder / "far ahead").touch()
            deadline = time.monotonic() + 10
            while rank == 1 and number == 5 and not (folder / "far ahead").exists():
                assert time.monotonic() < deadline, "rank 0 waits"
                time.sleep(0.01)
            yield batch

    rig.loader.batches = batches  # type: ignore[method-assign]
    rig.trainer.train()
    return [round_.end for round_ in setup.plan.rounds()]


def test_within_a_round_a_rank_need_not_wait_for_a_slow_step_of_another(tmp_path: Path) -> None:
    plan = Plan(COSINE, ConstantRule(24))
    setup = Setup(plan, log_every=24, timeout_seconds=20.0)
    ends = run_ranks(train_beside_a_slow_rank, 2, setup, tmp_path)
    assert ends == [[24], [24]]


def pooled_statistics(rank: int, ranks: int) -> list[float]:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    # other means, other sizes, and none on the last rank
    batches = [] if rank == 2 else [torch.arange(2.0 * n).view(n, 2) * (rank + 1) for n in (3, 5)]
    reestimate(net, batches, communicator)
    layer = net[0]
    assert isinstance(layer, torch.nn.BatchNorm1d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [*layer.running_mean.tolist(), *layer.running_var.tolist()]


def test_batchnorm_statistics_are_those_of_all_ranks_batches_pooled() -> None:
    pooled = torch.cat(
        [torch.arange(2.0 * n).view(n, 2) * (rank + 1) for rank in (0, 1) for n in (3, 5)]
    )
    expected = [*pooled.mean(0).tolist(), *pooled.var(0).tolist()]
    for values in run_ranks(pooled_statistics, 3):
        assert values == pytest.approx(expected, rel=1e-6)


def start_unequal(rank: int, ranks: int) -> str:
    setup = Setup(QSR, seed=rank)
    rig = build(setup, Topology(rank, ranks, rank, ranks))
    try:
        rig.trainer.train()
    except TrainingError as error:
        return str(error)
    return "went on"


def test_unequal_initial_weights_are_refused() -> None:
    for message in run_ranks(start_unequal, 2):
        assert "initial weights differ" in message


def evaluate_untrained(rank: int, ranks: int) -> Any:
    setup = Setup(QSR, workers=6, global_batch=12, samples=101, net=batchnorm_net)
    rig = build(setup, Topology(rank, ranks, rank, 6))
    replicas = [worker.model.flat for worker in rig.workers]
    return rig.evaluator.evaluate(replicas, 0, averaged=True)


def test_every_image_is_validated_once_on_any_number_of_ranks() -> None:
    """101 images in batches of 10 over 1, 2 and 3 ranks."""
    alone = evaluate_untrained(0, 1)
    assert alone.images == 101
    for ranks in (2, 3):
        for result in run_ranks(evaluate_untrained, ranks):
            assert (result.images, result.top1) == (101, alone.top1)
            assert result.loss == pytest.approx(alone.loss, rel=1e-6)


def average_over_time(rank: int, ranks: int, setup: Setup, ranks_per_worker: int) -> Any:
    """The averages over time of a run; the models, with the steps of their rounds, by which they
    were made; and the last row of the log."""
    rig = build(setup, Topology(rank, ranks, rank, setup.workers, ranks_per_worker))
    models: list[tuple[int, list[float]]] = []

    def record(round_: Round) -> None:
        update(round_)
        models.append((round_.length, rig.parameters().tolist()))

    averages = rig.trainer.state.averages
    update, averages.update = averages.update, record  # type: ignore[method-assign]
    rig.trainer.train()
    tensors = {name: t.flatten().tolist() for name, t in averages.tensors().items()}
    return tensors, models, without_times(rig.tracker.rows)[-1], list(averages.models)


@pytest.mark.parametrize(
    ("plan", "workers", "ranks_per_worker"),
    [(QSR, 4, 1), (GRADIENTS, 4, 1), (QSR, 1, 2)],
    ids=["two_workers_a_rank", "data_parallel", "two_ranks_a_worker"],
)
def test_every_rank_has_the_same_averages_over_time(
    plan: Plan, workers: int, ranks_per_worker: int
) -> None:
    setup = replace(SETUP, plan=plan, workers=workers, ema=EmaConfig(0.7, 1.0), folder=new_folder())
    first, second = run_ranks(average_over_time, 2, setup, ranks_per_worker)
    tensors, models, row, files = first
    assert second[:3] == (tensors, models, row)
    assert (files, second[3]) == (["ema", "uniform"], [])  # the first rank writes them
    lengths = [length for length, _ in models]
    assert sum(lengths) == 24
    ema = sums = torch.tensor(models[0][1], dtype=torch.float64)
    sums = lengths[0] * sums
    for length, values in models[1:]:
        model = torch.tensor(values, dtype=torch.float64)
        ema = 0.7**length * ema + (1 - 0.7**length) * model
        sums = sums + length * model
    for name, wanted in (("ema", ema), ("uniform", sums / 24)):
        own = [t for key, t in tensors.items() if f"/{name}/" in key]
        found = torch.tensor([value for t in own for value in t], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert 0 <= row[f"{name}_top1"] <= 100
