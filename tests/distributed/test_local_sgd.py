"""LocalSGD in a loop that is not ours, in real processes: equal by value to the Trainer, to a few
lines of numpy and to torch's own averager; resumed in the middle of a round; never a mixture."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional

from qsr import (
    CappedRule,
    ConstantRule,
    CosineSchedule,
    GrowingRule,
    OuterOptions,
    Plan,
    PostLocalRule,
    QuadraticRule,
    Rule,
    StagewiseRule,
    SwapRule,
)
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Request
from qsr.sync.local_sgd import LocalSGD
from tests.support import (
    MemoryLoader,
    Setup,
    adamw,
    batchnorm_net,
    digits_like,
    linear_net,
    run_ranks,
    sgd,
    train,
)

STEPS, WARMUP, PEAK = 60, 8, 0.1
SCHEDULE = CosineSchedule(peak_lr=PEAK, final_lr=0.0, total_steps=STEPS, warmup_steps=WARMUP)
QSR = QuadraticRule(h_base=2, alpha=0.15)
SAMPLES, BATCH, SEED = 96, 8, 1
OUTER = OuterOptions(lr=0.7, momentum=0.9, nesterov=True, rate_correction=True)


def start(seed: int = SEED, net: Callable[[], nn.Module] = linear_net) -> nn.Module:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    return net()


def batches(worker: int, workers: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The Trainer's batches of a worker."""
    sampler = Sampler(SAMPLES, BATCH, workers, SEED)
    loader = MemoryLoader(*digits_like(SAMPLES), noise=0.1)
    step = first
    while True:
        seed = seed_for(SEED, "augment", worker=worker, step=step)
        for batch in loader.batches([Request(sampler.indices(step, worker), seed)]):
            yield batch.images, batch.labels
        step += 1


def flat(model: nn.Module) -> list[float]:
    numbers: list[float] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return numbers


def set_rate(optimizer: torch.optim.Optimizer, step: int, schedule: CosineSchedule) -> None:
    for group in optimizer.param_groups:
        group["lr"] = schedule(min(step, schedule.total_steps - 1))


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sync: LocalSGD,
    *,
    schedule: CosineSchedule = SCHEDULE,
    until: int | None = None,
    gradients: bool = False,
    rate_last: bool = True,
) -> list[int]:
    """Train; the ends of the rounds. `rate_last`: the scheduler steps before `sync.step()`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ends = []
    own = batches(rank, ranks, sync.steps_done)
    for step in range(sync.steps_done, until or schedule.total_steps):
        images, labels = next(own)
        functional.cross_entropy(model(images), labels).backward()
        if gradients:
            sync.average_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if rate_last:
            set_rate(optimizer, step + 1, schedule)
        if sync.step():
            ends.append(sync.steps_done)
        if not rate_last:
            set_rate(optimizer, step + 1, schedule)
    return ends


def sgd_for(model: nn.Module, momentum: float = 0.9) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    set_rate(optimizer, 0, SCHEDULE)
    return optimizer


ARGUMENTS: dict[str, Any] = {"total_steps": STEPS, "warmup_steps": WARMUP, "peak_lr": PEAK}


def rounds_of(
    rank: int, ranks: int, rule: Rule, gradients: bool, rate_last: bool
) -> tuple[list[int], list[float], int]:
    model = start()
    optimizer = sgd_for(model)
    sync = LocalSGD(model, optimizer, rule, **ARGUMENTS)
    ends = loop(model, optimizer, sync, gradients=gradients, rate_last=rate_last)
    return ends, flat(model), sync.averages


@pytest.mark.parametrize("rate_last", [True, False], ids=["scheduler_first", "scheduler_last"])
@pytest.mark.parametrize(
    "rule",
    [
        QSR,
        ConstantRule(7),
        StagewiseRule(2),
        GrowingRule(2, 0.5),
        CappedRule(GrowingRule(2, 1.0), 6),
        PostLocalRule(20, 4),
        SwapRule(30),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rounds_and_weights_are_the_trainers(rule: Rule, rate_last: bool) -> None:
    """Bit for bit, with the learning rate read from the optimizer alone."""
    plan = Plan(SCHEDULE, rule)
    gradients = plan.gradient_rounds > 0
    found = run_ranks(rounds_of, 2, rule, gradients, rate_last)
    # one process with both workers sums in the same order as two processes
    setup = Setup(plan, optimizer=sgd(momentum=0.9), seed=SEED, bucket_mib=None)
    expected = train(setup).parameters().tolist()
    for ends, weights, averages in found:
        assert ends == [round_.end for round_ in plan.rounds()]
        assert averages == plan.num_rounds
        if gradients:  # there the sums of the gradients have other roundings
            assert weights == pytest.approx(expected, rel=1e-5, abs=1e-6)
        else:
            assert weights == expected


LONG = CosineSchedule(peak_lr=PEAK, final_lr=0.0, total_steps=1000, warmup_steps=50)


def long_run(rank: int, ranks: int) -> tuple[list[int], list[float]]:
    model = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.05)
    set_rate(optimizer, 0, LONG)
    sync = LocalSGD(model, optimizer, QSR, total_steps=1000, warmup_steps=50, peak_lr=PEAK)
    return loop(model, optimizer, sync, schedule=LONG), flat(model)


def test_a_thousand_steps_of_adamw_are_the_trainers() -> None:
    plan = Plan(LONG, QSR)
    expected = train(Setup(plan, optimizer=adamw(), seed=SEED)).parameters().tolist()
    for ends, weights in run_ranks(long_run, 2):
        assert ends == [round_.end for round_ in plan.rounds()]
        assert weights == expected


def quadratic(rank: int, ranks: int, rule: Rule) -> list[float]:
    """Worker k pulls x towards k, k + 1, ...: gradients that a reader can compute."""
    dist.init_process_group("gloo")
    model = nn.Linear(5, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = LocalSGD(model, optimizer, rule, total_steps=20)
    for _ in range(20):
        target = torch.arange(5.0) + rank
        (0.5 * (model.weight - target).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    return flat(model)


def test_three_workers_are_a_few_lines_of_numpy() -> None:
    x = np.ones((3, 5))
    targets = np.arange(5.0) + np.arange(3.0)[:, None]
    for step in range(1, 21):
        x -= 0.1 * (x - targets)
        if step % 6 == 0 or step == 20:  # the last round is cut
            x[:] = x.mean(axis=0)
    for weights in run_ranks(quadratic, 3, ConstantRule(6)):
        assert weights == pytest.approx(x[0].tolist(), rel=1e-6)


def beside_torch(rank: int, ranks: int) -> tuple[list[float], list[float]]:
    model, other = start(), start()
    ours, theirs = sgd_for(model), sgd_for(other)
    sync = LocalSGD(model, ours, ConstantRule(5), total_steps=STEPS)
    averager = PeriodicModelAverager(period=5, warmup_steps=4)
    loop(model, ours, sync)
    own = batches(rank, ranks)
    for step in range(STEPS):
        images, labels = next(own)
        functional.cross_entropy(other(images), labels).backward()
        theirs.step()
        averager.average_parameters(other.parameters())
        theirs.zero_grad()
        set_rate(theirs, step + 1, SCHEDULE)
    return flat(model), flat(other)


def test_constant_h_is_torchs_averager() -> None:
    for ours, theirs in run_ranks(beside_torch, 2):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def resumed(rank: int, ranks: int, stop: int, options: dict[str, Any]) -> tuple[Any, Any]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, LocalSGD]:
        model = start()
        optimizer = sgd_for(model)
        return model, optimizer, LocalSGD(model, optimizer, **ARGUMENTS, **{"rule": QSR} | options)

    model, optimizer, sync = build()
    ends = loop(model, optimizer, sync)
    whole = ends, flat(model), sync.summary()["bytes_sent_per_worker"]
    first, its_optimizer, its_sync = build()
    before = loop(first, its_optimizer, its_sync, until=stop)
    saved = first.state_dict(), its_optimizer.state_dict(), its_sync.state_dict()
    saved = torch.load(_through_a_file(saved, rank), weights_only=True)
    second, optimizer, sync = build()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sync.load_state_dict(saved[2])
    after = loop(second, optimizer, sync)
    again = [*before, *after], flat(second), sync.summary()["bytes_sent_per_worker"]
    return whole, again


def _through_a_file(values: Any, rank: int) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(values, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delay_steps": 2},
        {"average_momentum": True},
        {"flatten": False},
        {"rule": CappedRule(GrowingRule(2, 1.0), 9)},
        {"outer": OUTER},
        {"outer": OUTER, "flatten": False},
    ],
    ids=["plain", "delayed", "momentum", "in_place", "capped", "outer", "outer_in_place"],
)
@pytest.mark.parametrize("stop", [5, 13, 45], ids=["warm-up", "short_round", "long_round"])
def test_resumed_in_the_middle_of_a_round_has_the_same_bits(
    stop: int, options: dict[str, Any]
) -> None:
    for whole, again in run_ranks(resumed, 2, stop, options):
        assert again == whole


def corrected(rank: int, ranks: int, plan: Plan | None) -> list[float]:
    model = start()
    optimizer = sgd_for(model)
    options: dict[str, Any] = {"rule": QSR, **ARGUMENTS} if plan is None else {"plan": plan}
    loop(model, optimizer, LocalSGD(model, optimizer, outer=OUTER, **options))
    return flat(model)


def test_the_correction_for_varying_rounds_is_the_trainers() -> None:
    """With a plan to the bit; from the optimizer's rates, the sums have other roundings."""
    plan = Plan(SCHEDULE, QSR)
    setup = Setup(plan, optimizer=sgd(momentum=0.9), seed=SEED, outer=OUTER)
    expected = train(setup).parameters().tolist()
    assert run_ranks(corrected, 2, plan) == [expected] * 2
    for weights in run_ranks(corrected, 2, None):
        assert weights == pytest.approx(expected, rel=1e-4, abs=1e-5)


def with_options(rank: int, ranks: int, options: dict[str, Any]) -> list[float]:
    model = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.05)
    set_rate(optimizer, 0, SCHEDULE)
    loop(model, optimizer, LocalSGD(model, optimizer, QSR, **ARGUMENTS, **options))
    return flat(model)


@pytest.mark.parametrize(
    "options",
    [
        {"delay_steps": 3},
        {"average_momentum": True},
        {"average_second_moment": True},
        {"outer": OuterOptions(lr=0.7, momentum=0.9, nesterov=True)},
    ],
    ids=str,
)
def test_the_options_are_the_trainers(options: dict[str, Any]) -> None:
    setup = Setup(Plan(SCHEDULE, QSR), optimizer=adamw(), seed=SEED, **options)
    expected = train(setup).parameters().tolist()
    for weights in run_ranks(with_options, 2, options):
        assert weights == expected


def odd_parameters(rank: int, ranks: int, flatten: bool) -> tuple[list[str], bool, list[bool]]:
    """Tied, frozen, complex, bfloat16, channels_last, never used."""
    dist.init_process_group("gloo")
    torch.manual_seed(rank)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
            self.waves = nn.Parameter(torch.randn(7, dtype=torch.complex64))
            self.short = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
            self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
            self.scalar = nn.Parameter(torch.randn(()))

    model = Odd()
    everyone: list[Any] = [None] * ranks
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    dist.all_gather_object(everyone, values)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = LocalSGD(model, optimizer, ConstantRule(2), total_steps=4, flatten=flatten)
    sync.load_state_dict(sync.state_dict())  # workers that have trained may differ
    for _ in range(2):
        optimizer.step()
        sync.step()
    wrong = []
    for name, parameter in model.named_parameters():
        expected = values[name]
        if not name.startswith("frozen"):
            expected = (everyone[0][name] + everyone[1][name]) / 2
        if not torch.equal(parameter, expected):
            wrong.append(name)
    tied = model.first.weight is model.second.weight
    return wrong, tied, [model.conv.weight.is_contiguous(memory_format=torch.channels_last)]


def average_buffers(rank: int, ranks: int, average: bool) -> Any:
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = nn.Linear(2, 2)
    model.register_buffer("level", torch.tensor([1.0, 5.0]) * (rank + 1))
    model.register_buffer("count", torch.tensor(rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = LocalSGD(model, optimizer, ConstantRule(1), total_steps=1, average_buffers=average)
    optimizer.step()
    sync.step()
    buffers = dict(model.named_buffers())
    return buffers["level"].tolist(), buffers["count"].item()


def test_buffers_are_averaged_if_asked_and_if_they_are_numbers_with_fractions() -> None:
    assert run_ranks(average_buffers, 2, True) == [([1.5, 7.5], 0), ([1.5, 7.5], 1)]
    assert run_ranks(average_buffers, 2, False) == [([1.0, 5.0], 0), ([2.0, 10.0], 1)]


@pytest.mark.parametrize("flatten", [True, False])
def test_odd_parameters(flatten: bool) -> None:
    for found in run_ranks(odd_parameters, 2, flatten):
        assert found == ([], True, [True])


def evaluated(rank: int, ranks: int) -> Any:
    model = start(net=batchnorm_net)
    optimizer = sgd_for(model)
    sync = LocalSGD(model, optimizer, ConstantRule(10), total_steps=STEPS)
    loop(model, optimizer, sync, until=13)
    own = flat(model)
    buffers = [b.clone() for b in model.buffers()]
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, own)
    with sync.averaged():
        inside = flat(model)
        sync.reestimate_batchnorm(batches(rank, ranks), count=4)
        statistics = [b.clone() for b in model.buffers()]
    with pytest.raises(ZeroDivisionError), sync.averaged():
        raise ZeroDivisionError
    restored = flat(model) == own
    same = all(torch.equal(b, before) for b, before in zip(model.buffers(), buffers, strict=True))
    mean = torch.tensor(everyone, dtype=torch.float32).mean(dim=0).tolist()
    return inside == mean, restored and same and model.training, [s.tolist() for s in statistics]


def test_averaged_is_the_mean_for_a_while() -> None:
    first, second = run_ranks(evaluated, 2)
    assert first[:2] == second[:2] == (True, True)
    assert first[2] == second[2]  # pooled over both workers


def disagreeing(rank: int, ranks: int, how: str) -> tuple[str, bool]:
    model = start(seed=rank if how == "weights" else SEED)
    optimizer = sgd_for(model)
    before = flat(model)
    rule = ConstantRule(4 + rank) if how == "rule" else QuadraticRule(4, 0.4)
    try:
        sync = LocalSGD(model, optimizer, rule, total_steps=STEPS)
        set_rate(optimizer, 28 if how == "rate" and rank == 1 else 8, SCHEDULE)
        for step in range(STEPS):
            if how == "step" and rank == 1 and step == 2:
                with sync.averaged():  # the other one does not
                    pass
            nn.init.constant_(next(model.parameters()), float(step))
            before = flat(model)
            optimizer.step()
            sync.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}", flat(model) == before
    return "no error", True


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("rule", "DisagreementError: worker 1 builds another LocalSGD than worker 0"),
        ("rate", "the ranks disagree on h, lr"),
        ("step", "the ranks disagree on step"),
        ("weights", "TrainingError: the workers' initial weights differ: "),
    ],
)
def test_workers_that_disagree_are_never_mixed(how: str, text: str) -> None:
    for message, unmixed in run_ranks(disagreeing, 2, how):
        assert text in message
        assert unmixed


def skipping(rank: int, ranks: int) -> tuple[list[int], bool]:
    """Worker 1's GradScaler skips the update of the first step of a round."""
    model = start()
    optimizer = sgd_for(model)
    sync = LocalSGD(model, optimizer, QSR, **ARGUMENTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plan, own, ends = Plan(SCHEDULE, QSR), batches(rank, ranks), []
    skips = {round_.start for round_ in plan.rounds()} if rank == 1 else set()
    for step in range(STEPS):
        images, labels = next(own)
        scaler.scale(functional.cross_entropy(model(images), labels)).backward()
        if step in skips and step > 3:
            model[1].weight.grad.fill_(float("inf"))  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        set_rate(optimizer, step + 1, SCHEDULE)
        if sync.step():
            ends.append(sync.steps_done)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, flat(model))
    return ends, everyone[0] == everyone[1]


def test_updates_that_gradscaler_skips_count() -> None:
    expected = [round_.end for round_ in Plan(SCHEDULE, QSR).rounds()]
    assert run_ranks(skipping, 2) == [(expected, True)] * 2


def wrapped(rank: int, ranks: int) -> str:
    model = nn.parallel.DistributedDataParallel(start())
    with pytest.raises(ValueError, match="over the workers' own processes") as refused:
        LocalSGD(model, sgd_for(model), QSR, **ARGUMENTS)
    return str(refused.value)


def test_ddp_over_the_same_processes_is_refused() -> None:
    assert len(run_ranks(wrapped, 2)) == 2


def hybrid(rank: int, ranks: int) -> tuple[list[float], list[int], int]:
    """Workers of two processes: DDP inside, LocalSGD across."""
    model = start()
    worker, inside = divmod(rank, 2)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    ddp = nn.parallel.DistributedDataParallel(model, process_group=pairs[worker])
    optimizer = sgd_for(model)
    group = across[inside]
    assert isinstance(group, dist.ProcessGroup)
    sync = LocalSGD(ddp, optimizer, QSR, group=group, **ARGUMENTS)
    own, ends = batches(worker, 2), []
    for step in range(STEPS):
        images, labels = next(own)
        half = slice(inside * len(labels) // 2, (inside + 1) * len(labels) // 2)
        functional.cross_entropy(ddp(images[half]), labels[half]).backward()
        optimizer.step()
        optimizer.zero_grad()
        set_rate(optimizer, step + 1, SCHEDULE)
        if sync.step():
            ends.append(sync.steps_done)
    return flat(model), ends, sync.summary()["bytes_sent_per_worker"]


def test_workers_of_two_processes_are_two_workers_of_twice_the_batch() -> None:
    plan = Plan(SCHEDULE, QSR)
    expected = train(Setup(plan, optimizer=sgd(momentum=0.9), seed=SEED)).parameters().tolist()
    for weights, ends, sent in run_ranks(hybrid, 4):
        assert weights == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert ends == [round_.end for round_ in plan.rounds()]
        assert sent == plan.num_rounds * 4 * len(expected)  # a ring of two sends each byte once


def test_the_ends_are_those_of_the_plan() -> None:
    ends = [round_.end for round_ in Plan(SCHEDULE, QSR).rounds()]
    assert ends[-1] == STEPS
    assert all(first < second for first, second in pairwise(ends))
