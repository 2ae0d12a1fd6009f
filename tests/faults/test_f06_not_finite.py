"""F6: a loss, a gradient or a state is no longer finite. All ranks stop after the same step,
nothing of that step is saved, and the run can resume from the previous checkpoint. Where fp16
overflows, one worker skips one update, and averages happen at the same steps as before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan
from qsr.errors import TrainingError
from qsr.sync.topology import Topology
from qsr.train.precision import LossScale
from tests.faults.small import steps_in
from tests.support import (
    LossWithAccident,
    Rig,
    Setup,
    adamw,
    build,
    linear_net,
    run_ranks,
    sgd,
    train,
)

RATE = ConstantSchedule(0.1, 20)
PLANS = {"local": Plan(RATE, ConstantRule(8)), "gradients": Plan(RATE, EveryStepRule("gradients"))}


class LossOnOneRank:
    """A loss with an accident in a step of rank 1. A class, because processes get it pickled."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on(self, rank: int) -> LossWithAccident:
        return LossWithAccident(self.step if rank == 1 else 0, self.value)


def session(rank: int, ranks: int, setup: Setup, accident: LossOnOneRank) -> Any:
    """How a session of the run ended, and with which parameters."""
    rig = build(replace(setup, loss=accident.on(rank)), Topology(rank, ranks, rank, ranks))
    rig.trainer.restore()
    first = rig.trainer.progress.step
    try:
        rig.trainer.train()
    except TrainingError as error:
        return first, rig.trainer.progress.step, str(error)
    return first, rig.trainer.progress.step, rig.parameters().tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("plan", PLANS)
def test_all_ranks_stop_after_the_same_step_and_go_on_from_the_checkpoint_before(
    plan: str, value: float, tmp_path: Path
) -> None:
    setup = Setup(PLANS[plan], log_every=4, checkpoint_every=3, folder=tmp_path / "run")
    none = LossOnOneRank(0, value)
    whole = run_ranks(session, 2, replace(setup, folder=tmp_path / "whole"), none)
    stopped = run_ranks(session, 2, setup, LossOnOneRank(7, value))
    for first, step, message in stopped:
        assert (first, step) == (0, 8)  # the first log after it
        assert message.startswith("the loss is not finite at or before step 8 (round ")
        assert "earlier checkpoints are untouched; try a lower schedule.peak_lr" in message
    assert steps_in(tmp_path / "run" / "checkpoints") == [3, 6]
    resumed = run_ranks(session, 2, setup, none)
    assert [first for first, *_ in resumed] == [6, 6]
    assert [end for _, *end in resumed] == [end for _, *end in whole]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(
    tmp_path: Path, value: float
) -> None:
    plan = Plan(ConstantSchedule(0.1, 20), ConstantRule(4))
    setup = Setup(plan, checkpoint_every=5, folder=tmp_path, loss=LossWithAccident(14, value))
    rig = build(setup)
    with pytest.raises(TrainingError, match="loss is not finite at or before step 10"):
        rig.trainer.train()
    assert steps_in(tmp_path / "checkpoints") == [5]


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def far_too_wide() -> nn.Module:
        net = linear_net()
        for parameter in net.parameters():
            nn.init.constant_(parameter, 1e38)
        return net

    plan = Plan(ConstantSchedule(1e-9, 4), ConstantRule(2))

    def harmless(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return sum((p.flatten()[0] * 0.0 for p in model.parameters()), start=torch.zeros(()))

    setup = Setup(plan, net=far_too_wide, loss=harmless, folder=tmp_path)
    with pytest.raises(TrainingError, match="the validation loss is nan at step 4"):
        train(setup)
    assert not (tmp_path / "checkpoints").exists()


class WithBystander(nn.Module):
    """A net with a parameter that has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_net()
        self.bystander = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(images)
        return result


def spoil_parameter(rig: Rig) -> None:
    bystander: Any = rig.workers[0].model.module.bystander
    bystander.data[1] = float("nan")


def spoil_second_moment(rig: Rig) -> None:
    """As by a gradient whose square is infinite: the update is 0 then, here and ever after, and
    neither parameters nor losses tell."""
    optimizer = rig.workers[0].optimizer
    optimizer.state[rig.workers[0].model.module.net[1].bias]["exp_avg_sq"][0] = float("inf")  # type: ignore[union-attr,index]


def spoiled_session(
    rank: int, ranks: int, setup: Setup, spoil: Callable[[Rig], None], at: int
) -> tuple[int, str]:
    """Rank 1 is spoiled after `at` steps."""
    rig = build(setup, Topology(rank, ranks, rank, ranks))
    trainer: Any = rig.trainer
    due = trainer._do_what_is_due

    def spoil_then(*arguments: Any) -> None:
        if rank == 1 and rig.trainer.progress.step == at:
            spoil(rig)
        due(*arguments)

    trainer._do_what_is_due = spoil_then
    try:
        rig.trainer.train()
    except TrainingError as error:
        return rig.trainer.progress.step, str(error)
    return rig.trainer.progress.step, "went on"


@pytest.mark.parametrize("spoil", [spoil_parameter, spoil_second_moment])
@pytest.mark.parametrize("at", [5, 7, 8])
def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(
    spoil: Callable[[Rig], None], at: int, tmp_path: Path
) -> None:
    """Spoiled in the middle of a round, right before a checkpoint, at an average: one rank has it,
    none saves it, whatever the losses say."""
    rule = Plan(ConstantSchedule(0.01, 20), ConstantRule(8))
    setup = Setup(rule, net=WithBystander, optimizer=adamw(weight_decay=0.0), folder=tmp_path)
    setup = replace(setup, checkpoint_every=4, log_every=1)
    results = run_ranks(spoiled_session, 2, setup, spoil, at)
    for step, message in results:
        assert step == 8
        assert message.startswith("parameters or optimizer states are not finite at step 8; noth")
    assert steps_in(tmp_path / "checkpoints") == [4]


# fp16, which loses what is too large for it


def small_scale(rig: Rig) -> Rig:
    """No overflow but the accident."""
    for worker in rig.workers:
        worker.scaler = LossScale("cpu", repeat=False, init_scale=256.0)
    return rig


def fp16_session(rank: int, ranks: int, setup: Setup, accident: LossOnOneRank) -> Any:
    """The rows of the log, the parameters and the loss scale at the end of the session."""
    rig = build(replace(setup, loss=accident.on(rank)), Topology(rank, ranks, rank, ranks))
    small_scale(rig).trainer.train()
    rows = [
        (row["step"], row["round"], row["h"], row["lr"], row["averages"], row["skipped_updates"])
        for row in rig.tracker.rows
        if row["kind"] == "train"
    ]
    return rows, rig.parameters().tolist(), rig.workers[0].scaler.get_scale()


def test_fp16_overflow_skips_one_ranks_update_and_moves_no_average(tmp_path: Path) -> None:
    plan = Plan(ConstantSchedule(0.1, 8), ConstantRule(4))
    base = Setup(plan, precision="fp16", log_every=1)

    def run(name: str, stop_after: int | None, accident: int) -> list[Any]:
        setup = replace(base, folder=tmp_path / name, stop_after=stop_after)
        return run_ranks(fp16_session, 2, setup, LossOnOneRank(accident, float("inf")))

    before, after = run("before", 1, 0), run("after", 2, 2)
    healthy = run("healthy", 2, 0)
    assert after[1][1] == before[1][1]  # the second update of rank 1 is skipped
    assert after[0][1] == healthy[0][1] != before[0][1]  # and no other one
    assert [scale for *_, scale in after] == [256.0, 128.0]

    undisturbed, (ours, theirs) = run("undisturbed", None, 0), run("whole", None, 2)
    assert ours[1] == theirs[1] != undisturbed[0][1]
    schedule = [row[:-1] for row in ours[0]]
    assert schedule == [row[:-1] for row in undisturbed[0][0]]
    assert [averages for *_, averages in schedule] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert [skipped for *_, skipped in ours[0]] == [0, 1, 1, 1, 1, 1, 1, 1]


def test_fp16_overflow_skips_one_workers_update_and_no_step() -> None:
    plan = Plan(ConstantSchedule(0.1, 8), ConstantRule(4))
    accident = LossWithAccident(at=4, value=float("inf"))  # step 1, worker 1
    rig = small_scale(build(Setup(plan, precision="fp16", loss=accident, log_every=4, samples=32)))
    rig.trainer.train()
    assert rig.trainer.progress.skipped_updates == 1
    assert rig.trainer.progress.averages == 2  # the plan's, unshifted
    assert rig.trainer.progress.step == 8
    assert torch.equal(rig.parameters(0), rig.parameters(1))
    assert rig.parameters().isfinite().all()
    rows = [row for row in rig.tracker.rows if row["kind"] == "train"]
    assert rows[-1]["skipped_updates"] == 1
    assert [worker.scaler.get_scale() for worker in rig.workers] == [256.0, 128.0]


def test_first_update_skipped_leaves_no_garbage_in_the_momentum() -> None:
    plan = Plan(ConstantSchedule(0.1, 4), ConstantRule(4))
    skipped = LossWithAccident(at=1, value=float("inf"))
    setup = Setup(plan, workers=1, precision="fp16", loss=skipped, optimizer=sgd(momentum=0.9))
    rig = small_scale(build(setup))
    rig.trainer.train()
    momenta = [state["momentum_buffer"] for state in rig.workers[0].optimizer.state.values()]
    assert max(momentum.abs().max().item() for momentum in momenta) < 10.0
    assert rig.trainer.progress.skipped_updates == 1
