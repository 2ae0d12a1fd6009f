"""F17: ranks disagree about the step, H, the learning rate, the samples, the settings or the data.
All of them stop with an error before their parameters are mixed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsr import (
    ConstantRule,
    ConstantSchedule,
    CosineSchedule,
    EveryStepRule,
    Plan,
    QuadraticRule,
    StepSchedule,
)
from qsr import build as product
from qsr.cluster.group import join_process_group
from qsr.config.load import load_config
from qsr.core.plan import Round
from qsr.core.sampling import Sampler
from qsr.errors import DataError, DisagreementError
from qsr.sync.averaging import Averager
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers
from qsr.sync.topology import Topology
from tests.cli import RUN
from tests.image_trees import plant
from tests.support import CPU, Setup, build, linear_net, run_ranks

RATE = ConstantSchedule(0.1, 24)
LOCAL = Plan(RATE, ConstantRule(4))
GRADIENTS = Plan(RATE, EveryStepRule("gradients"))
COSINE = CosineSchedule(0.1, 1e-4, 0, 24)
SAMPLER = Sampler(96, 8, 2, seed=1)
MARK = Fingerprint(step=8, round=2, h=4, lr=0.1, sampler=SAMPLER, config="c0ffee")
OTHER = Fingerprint(9, 3, 5, 0.2, replace(SAMPLER, seed=2), "decaf")


def disagree(rank: int, ranks: int, field: str) -> str:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    buffers = FlatBuffers([torch.ones(3)], FINGERPRINT_SIZE)
    averager = Averager(communicator)
    averager.average_([buffers], MARK)  # all agree
    mark = MARK._replace(**{field: getattr(OTHER, field)}) if rank == 1 else MARK
    try:
        averager.average_([buffers], mark)
    except DisagreementError as error:
        return str(error)
    return "mixed in silence"


@pytest.mark.parametrize("field", Fingerprint._fields)
def test_ranks_that_disagree_get_an_error_at_the_next_average(field: str) -> None:
    for message in run_ranks(disagree, 2, field):
        assert f"disagree on {field} " in message


def same_net() -> nn.Module:
    """Whatever the seed of the run, which is the sampler's too."""
    torch.manual_seed(1)
    return linear_net()


def skip_step(trainer: Any, skipped: int) -> None:
    steps = trainer._steps
    trainer._steps = lambda *of_round: (step for step in steps(*of_round) if step != skipped)


def skip_average(trainer: Any, skipped: int) -> None:
    end_round = trainer._end_round

    def end(round_: Round) -> None:
        if round_.index != skipped:
            end_round(round_)

    trainer._end_round = end


def train_on(rank: int, ranks: int, ours: Setup, theirs: Setup, fault: Any, at: int) -> Any:
    """What came of a run in which rank 1 is set up otherwise or, in training, makes a mistake."""
    rig = build(theirs if rank == 1 else ours, Topology(rank, ranks, rank, ranks))
    if rank == 1 and fault is not None:
        fault(rig.trainer, at)
    try:
        rig.trainer.train()
    except DisagreementError as error:
        return rig.trainer.progress.averages, str(error).partition("disagree on ")[2]
    return "went on"


Runs = Callable[..., list[Any]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Two ranks, of which the second differs; nothing must have been saved at the end."""

    def run(
        plan: Plan,
        changes: dict[str, Any],
        fault: Callable[[Any, int], None] | None = None,
        at: int = 0,
        *,
        timeout_seconds: float = 60.0,
    ) -> list[Any]:
        ours = Setup(plan, net=same_net, folder=tmp_path, timeout_seconds=timeout_seconds)
        results = run_ranks(train_on, 2, ours, replace(ours, **changes), fault, at)
        assert not (tmp_path / "checkpoints").exists()
        return results

    return run


@pytest.mark.parametrize(
    ("plan", "changes", "step", "averages", "fields"),
    [
        (LOCAL, {"config_hash": "c0ffee"}, 1, 0, "config"),
        (LOCAL, {"plan": Plan(RATE, ConstantRule(1))}, 1, 0, "h"),
        (LOCAL, {"plan": Plan(ConstantSchedule(0.2, 24), ConstantRule(4))}, 1, 0, "lr"),
        (LOCAL, {"seed": 2}, 1, 0, "sampler"),
        (LOCAL, {"samples": 88}, 1, 0, "sampler"),
        # H and the rate are the same at first
        (
            Plan(COSINE, QuadraticRule(2, 0.15)),
            {"plan": Plan(COSINE, QuadraticRule(2, 0.17))},
            5,
            2,
            "h",
        ),
        (LOCAL, {"plan": Plan(StepSchedule(0.1, (14,), 0.5, 24), ConstantRule(4))}, 15, 3, "lr"),
        # one gradient has been averaged when the answer comes
        (GRADIENTS, {"config_hash": "c0ffee"}, 1, 1, "config"),
        (GRADIENTS, {"plan": Plan(ConstantSchedule(0.2, 24), GRADIENTS.rule)}, 1, 1, "lr"),
        (GRADIENTS, {"seed": 2}, 1, 1, "sampler"),
    ],
)
def test_a_rank_that_does_something_else_is_noticed_in_that_step(
    runs: Runs, plan: Plan, changes: dict[str, Any], step: int, averages: int, fields: str
) -> None:
    for averaged, message in runs(plan, changes):
        assert averaged == averages
        assert message.startswith(f"{fields} (here step={step}, ")


@pytest.mark.parametrize("skipped", [4, 5, 6, 7])
@pytest.mark.parametrize("plan", [LOCAL, GRADIENTS], ids=["local", "data_parallel"])
def test_a_rank_that_skips_a_step_is_noticed_in_that_step(
    runs: Runs, plan: Plan, skipped: int
) -> None:
    """Of the 0-based steps 4 to 7, the second round, whose average never comes."""
    for late, (averaged, message) in enumerate(runs(plan, {}, skip_step, skipped)):
        assert averaged == (1 if plan is LOCAL else skipped + 1)
        assert message.startswith("step")
        assert f" (here step={skipped + 1 + late}, " in message


def test_a_rank_that_leaves_out_an_average_is_not_mixed_with_the_next(runs: Runs) -> None:
    """What it sends next is no average: the group breaks, or nobody gets an answer."""
    for result in runs(LOCAL, {}, skip_average, 1, timeout_seconds=2.0):
        assert isinstance(result, int) or "Error: " in result


def open_other_data(rank: int, ranks: int, roots: list[Path], runs_dir: Path) -> str:
    settings = [*RUN, "data=folder", f"data.root={roots[rank]}", f"runs_dir={runs_dir}"]
    try:
        product.run(load_config([*settings, "cluster.ranks=2", "data.loader=torchvision"]))
    except DataError as error:
        return str(error)
    return "went on"


def test_machines_with_other_data_are_noticed_at_the_start(tmp_path: Path) -> None:
    """Each has a copy of its own; as many images, but one has another name."""
    roots = [tmp_path / "one", tmp_path / "other"]
    for root, last in zip(roots, ("63.png", "64.png"), strict=True):
        names = [*(f"{i:02d}.png" for i in range(63)), last]
        plant(root, *(f"{split}/a/{name}" for split in ("train", "val") for name in names))
    for message in run_ranks(open_other_data, 2, roots, tmp_path / "runs"):
        assert message.startswith("rank 1 has different data than rank 0 (train_files: ")
        assert message.endswith("): use the same files and packages on all machines")
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
