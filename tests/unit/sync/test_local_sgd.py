"""LocalSGD alone: its arguments, the order of calls, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from qsr import ConstantRule, CosineSchedule, OuterOptions, Plan, PostLocalRule, QuadraticRule
from qsr.errors import TrainingError
from qsr.sync.local_sgd import LocalSGD

RULE = QuadraticRule(h_base=2, alpha=0.2)
SCHEDULE = CosineSchedule(peak_lr=0.1, final_lr=0.0, total_steps=40, warmup_steps=5)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def parts(**options: Any) -> tuple[nn.Sequential, torch.optim.SGD, LocalSGD]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments: dict[str, Any] = {"rule": RULE, "total_steps": 40} | options
    return model, optimizer, LocalSGD(model, optimizer, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": None}, "either a rule or a plan"),
        ({"plan": Plan(SCHEDULE, RULE)}, "either a rule or a plan"),
        ({"rule": None, "plan": Plan(SCHEDULE, RULE)}, "a plan has its own total_steps"),
        ({"total_steps": None}, "give total_steps"),
        ({"total_steps": 0}, "give total_steps"),
        ({"warmup_steps": 5}, "give peak_lr"),
        ({"warmup_steps": -1}, "warmup_steps cannot be negative"),
        ({"delay_steps": -1}, "delay_steps cannot be negative"),
        ({"delay_steps": 1, "outer": OuterOptions(lr=0.7)}, "needs the average at the round's end"),
        ({"delay_steps": 1, "flatten": False}, "delay_steps needs parameters that can be moved"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(**options)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="no trainable parameters"):
        LocalSGD(model, optimizer, RULE, total_steps=4)


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    "step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 25, 33], gamma=0.3),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 40),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("first", [True, False], ids=["scheduler_first", "scheduler_last"])
def test_rounds_follow_any_scheduler(name: str, first: bool) -> None:
    """H is that of the rate with which torch's optimizer made the first update of the round."""
    _, optimizer, sync = parts()
    scheduler = SCHEDULERS[name](optimizer)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    ends = []
    for _ in range(40):
        optimizer.step()
        if first:
            scheduler.step()
        if sync.step():
            ends.append(sync.steps_done)
        if not first:
            scheduler.step()
    expected, start = [], 0
    while start < 40:
        h = max(2, int((0.2 / rates[start]) ** 2)) if rates[start] > 0 else 40
        start = min(40, start + h)
        expected.append(start)
    assert ends == expected


def test_a_plan_gives_the_same_rounds_and_checks_the_rate() -> None:
    plan = Plan(SCHEDULE, RULE)
    _, optimizer, sync = parts(rule=None, total_steps=None, plan=plan)
    ends = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = SCHEDULE(step)
        optimizer.step()
        if sync.step():
            ends.append(sync.steps_done)
    assert ends == [round_.end for round_ in plan.rounds()]
    summary = sync.summary()
    assert summary["averages"] == summary["planned_averages"] == plan.num_rounds
    assert summary["volume"] == summary["planned_volume"] == plan.volume
    _, optimizer, _ = parts(rule=None, total_steps=None, plan=plan)
    with pytest.raises(TrainingError, match=r"rate is 0\.1 in step 0, but the plan's is 0"):
        optimizer.step()


def test_the_largest_rate_decides_or_that_of_the_group_named() -> None:
    for group, h in ((None, 4), (1, 16)):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(
            [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.05}]
        )
        sync = LocalSGD(model, optimizer, RULE, total_steps=40, param_group=group)
        optimizer.step()
        assert not sync.step()
        assert sync.summary()["h"] == h


def test_missing_and_superfluous_calls_are_noticed() -> None:
    _, optimizer, sync = parts()
    optimizer.step()
    optimizer.step()
    with pytest.raises(TrainingError, match=r"ran 2 times since the last sync\.step\(\)"):
        sync.step()

    _, optimizer, sync = parts(total_steps=1000)
    with pytest.raises(TrainingError, match="once per optimizer step, not per micro-batch"):  # noqa: PT012
        for step in range(40):
            if step % 4 == 3:
                optimizer.step()
            sync.step()


def test_no_step_after_the_last() -> None:
    _, optimizer, sync = parts(rule=ConstantRule(3), total_steps=4)
    ended = []
    for _ in range(4):
        optimizer.step()
        ended.append(sync.step())
    assert ended == [False, False, True, True]
    optimizer.step()  # training may go on without averages
    with pytest.raises(TrainingError, match="total_steps=4, and all are done"):
        sync.step()


def test_new_and_moved_parameters_are_named() -> None:
    model, optimizer, sync = parts(rule=ConstantRule(1))
    optimizer.step()
    sync.step()
    model.append(nn.Linear(2, 2, bias=False))
    with pytest.raises(TrainingError, match=r"the parameter 3\.weight is new"):
        optimizer.step()
    model, optimizer, sync = parts(rule=ConstantRule(1))
    model[2].bias.data = torch.zeros(2)
    with pytest.raises(TrainingError, match=r"the parameter 2\.bias was moved"):
        optimizer.step()
    model, optimizer, sync = parts(rule=ConstantRule(1))
    model[0].requires_grad_(False)
    with pytest.raises(TrainingError, match="is frozen or gone"):
        optimizer.step()


def test_the_state_of_another_run_is_refused() -> None:
    _, _, sync = parts()
    state = sync.state_dict()
    with pytest.raises(TrainingError, match=r"of another run \(QuadraticRule.*total_steps=40"):
        parts(total_steps=41)[2].load_state_dict(state)
    with pytest.raises(TrainingError, match="is of a run with 3 workers, but here are 1"):
        sync.load_state_dict(state | {"workers": 3})


def test_every_average_is_told() -> None:
    told: list[int] = []
    _, optimizer, sync = parts(
        rule=PostLocalRule(2, 5), total_steps=12, on_average=lambda s: told.append(s["step"])
    )
    for _ in range(12):
        sync.average_gradients()
        optimizer.step()
        sync.step()
    assert told == [7, 12]
    assert sync.averages == 4  # two of gradients


def test_a_compiled_model_trains_in_its_buffers() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled: Any = torch.compile(model, backend="eager")
    sync = LocalSGD(compiled, optimizer, ConstantRule(2), total_steps=4)
    for _ in range(4):
        compiled(torch.ones(5, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = sync.step()
    assert ended
