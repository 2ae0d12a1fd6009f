"""The fp16 loss scale: when a batch is repeated, when an update is skipped, and that neither makes
another run of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan
from qsr.config.schema import LossConfig
from qsr.sync.topology import Topology
from qsr.train.losses import TrainingLoss
from qsr.train.precision import GROWTH_STEPS, MOST_REPEATS, SETTLED_STEPS, LossScale
from tests.support import Rig, Setup, build, run_ranks


class Scaled:
    """One parameter with gradients that overflow where scale x gradient exceeds `limit`."""

    def __init__(self, **arguments: Any) -> None:
        self.parameter = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.parameter], lr=1.0, fused=True)
        self.scale = LossScale("cpu", **arguments)

    def step(self, gradient: float, limit: float = 65504.0) -> int:
        """One step; how often its batch was repeated."""
        repeats = 0
        while True:
            scaled = gradient * self.scale.scale(torch.ones(1))
            self.parameter.grad = torch.where(scaled <= limit, scaled, float("inf"))
            self.scale.unscale_(self.optimizer)
            if not self.scale.must_repeat(self.optimizer):
                break
            repeats += 1
        self.scale.step(self.optimizer)
        self.scale.update()
        return repeats


@pytest.mark.parametrize(
    ("gradient", "repeats", "scale"),
    [
        (0.5, 0, 65536),
        (1.0, 1, 32768),  # 65,536 x 1 > 65,504
        (10.0, 4, 4096),
        (1000.0, 10, 64),
    ],
)
def test_the_first_update_is_kept_at_the_first_scale_that_holds(
    gradient: float, repeats: int, scale: float
) -> None:
    scaled = Scaled()
    assert scaled.step(gradient) == repeats
    assert scaled.scale.get_scale() == scale
    assert scaled.parameter.item() == -gradient
    assert scaled.step(gradient) == 0


def test_without_repeats_the_first_updates_are_skipped() -> None:
    scaled = Scaled(repeat=False)
    for step in range(6):
        assert scaled.step(10.0) == 0
        assert scaled.parameter.item() == -10.0 * max(0, step - 3)  # 4 steps are lost


def test_an_overflow_is_repeated_until_the_scale_is_settled_and_skipped_then() -> None:
    for before, lost in ((SETTLED_STEPS - 1, False), (SETTLED_STEPS, True)):
        scaled = Scaled(init_scale=1024.0)
        for _ in range(before):
            scaled.step(1.0)
        assert scaled.step(100.0) == (0 if lost else 1)
        assert scaled.parameter.item() == -before - (0 if lost else 100)
        assert scaled.scale.get_scale() == 512


def test_a_settled_scale_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gradients overflowed is on the device: reading it is what would wait."""
    scaled = Scaled(init_scale=1024.0)
    for _ in range(SETTLED_STEPS):
        scaled.step(1.0)

    def wait(self: Tensor) -> float:
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(Tensor, "item", wait)
    for _ in range(50):
        scaled.scale.unscale_(scaled.optimizer)
        assert not scaled.scale.must_repeat(scaled.optimizer)
        scaled.scale.step(scaled.optimizer)
        scaled.scale.update()


def test_the_scale_doubles_after_it_has_held_and_its_overflow_is_repeated() -> None:
    scaled = Scaled(init_scale=32768.0)
    for _ in range(GROWTH_STEPS):
        assert scaled.step(1.0) == 0
    assert scaled.scale.get_scale() == 65536
    assert scaled.step(1.0) == 1  # too much, seen at once
    assert scaled.scale.get_scale() == 32768
    assert scaled.parameter.item() == -(GROWTH_STEPS + 1)  # no update was lost


def test_what_no_scale_mends_is_given_up() -> None:
    scaled = Scaled()
    assert scaled.step(float("nan")) == MOST_REPEATS
    assert scaled.step(float("nan")) == 0
    assert scaled.parameter.item() == 0


def test_a_restored_scale_goes_on_as_it_would_have() -> None:
    for steps in (SETTLED_STEPS - 1, GROWTH_STEPS - 1):
        whole, first, second = (Scaled(init_scale=1024.0) for _ in range(3))
        for _ in range(steps):
            whole.step(1.0)
            first.step(1.0)
        second.scale.load_state_dict(first.scale.state_dict())
        for gradient in (1.0, 100.0, 1.0):
            assert whole.step(gradient) == second.step(gradient)
            assert whole.scale.state_dict() == second.scale.state_dict()


# In a run


class Steep(TrainingLoss):
    """A loss whose gradients overflow in fp16 at the scale that runs start with."""

    def __init__(self, factor: float) -> None:
        super().__init__(LossConfig(0.0, 0.0))
        self.factor = factor

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return self.factor * super().__call__(model, images, labels, seed)


RATE = ConstantSchedule(0.001, 8)
LOCAL, PARALLEL = Plan(RATE, ConstantRule(4)), Plan(RATE, EveryStepRule("gradients"))


def rig_at(setup: Setup, *, repeat: bool, scale: float, topology: Topology | None = None) -> Rig:
    rig = build(setup, topology)
    for worker in rig.workers:
        worker.scaler = LossScale("cpu", repeat=repeat, init_scale=scale)
    return rig


@pytest.mark.parametrize("plan", [LOCAL, PARALLEL], ids=["local", "parallel"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_run_loses_no_update(plan: Plan, micro_batch: int | None, tmp_path: Path) -> None:
    """It ends with the bits of a run that began with the scale that was found; scales are powers of
    two, and change no other bit."""
    setup = Setup(plan, precision="fp16", loss=Steep(100.0), micro_batch=micro_batch, log_every=2)
    repeating = rig_at(setup, repeat=True, scale=65536.0)
    repeating.trainer.train()
    progress = repeating.trainer.progress
    assert progress.skipped_updates == 0
    assert progress.repeated_batches >= 2 * len(repeating.workers)
    found = repeating.workers[0].scaler.get_scale()
    assert found < 65536

    knowing = rig_at(setup, repeat=False, scale=found)
    knowing.trainer.train()
    assert knowing.trainer.progress.skipped_updates == 0
    skipping = rig_at(setup, repeat=False, scale=65536.0)
    skipping.trainer.train()
    assert skipping.trainer.progress.skipped_updates > 0
    assert torch.equal(repeating.parameters(), knowing.parameters())
    assert not torch.equal(repeating.parameters(), skipping.parameters())

    rows = [
        [row for row in rig.tracker.rows if row["kind"] == "train"] for rig in (repeating, knowing)
    ]
    losses = [[row["loss"] for row in of_run] for of_run in rows]
    assert losses[0] == losses[1]  # no loss of a repeated batch is counted
    assert rows[0][-1]["repeated_batches"] == progress.repeated_batches
    averaged = [rig.trainer.progress.averages for rig in (repeating, knowing)]
    assert averaged[0] == averaged[1] == plan.num_rounds


def steep_sessions(
    rank: int, ranks: int, setups: list[Setup], factors: tuple[float, ...]
) -> list[Any]:
    """One after the other, in processes that are started once."""
    return [_steep_session(rank, ranks, setup, factors[rank]) for setup in setups]


def _steep_session(rank: int, ranks: int, setup: Setup, factor: float) -> Any:
    mine = replace(setup, loss=Steep(factor))
    rig = rig_at(mine, repeat=True, scale=65536.0, topology=Topology(rank, ranks, rank, ranks))
    rig.trainer.train()
    progress = rig.trainer.progress
    return (
        rig.parameters().tolist(),
        progress.repeated_batches,
        progress.skipped_updates,
        rig.workers[0].scaler.get_scale(),
    )


def test_one_rank_repeats_by_itself_in_local_rounds_and_all_do_in_data_parallel_ones(
    tmp_path: Path,
) -> None:
    cases = [(LOCAL, 25.0), (PARALLEL, 25.0), (PARALLEL, None)]
    setups = [
        Setup(plan, precision="fp16", bucket_mib=bucket, folder=tmp_path / str(number))
        for number, (plan, bucket) in enumerate(cases)
    ]
    main, other = run_ranks(steep_sessions, 2, setups, (1.0, 1000.0))
    for (plan, _), one, two in zip(cases, main, other, strict=True):
        (first, repeated, skipped, scale), (second, *_, other_scale) = one, two
        assert first == second
        assert skipped == 0
        if plan is LOCAL:
            assert scale > other_scale
            assert repeated > 0
        else:
            assert scale == other_scale < 65536
            assert repeated % 2 == 0  # both, each time


def test_a_rank_takes_the_batches_of_its_workers_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a data parallel step too: loading goes on beside computing, and one batch is held."""
    events: list[str] = []

    class Noting(Steep):
        def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
            events.append("pass")
            return super().__call__(model, images, labels, seed)

    rig = build(Setup(PARALLEL, workers=4, loss=Noting(1.0)))
    deliver = rig.loader.batches

    def noted(requests: Any) -> Any:
        for batch in deliver(requests):
            events.append("batch")
            yield batch

    monkeypatch.setattr(rig.loader, "batches", noted)
    rig.trainer.train()
    # the first batch is taken once more before, for DDP's buckets
    assert events.count("batch") == events.count("pass") == 8 * 4
    assert events[1:] == ["pass", "batch"] * 31 + ["pass"]
