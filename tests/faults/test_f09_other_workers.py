"""F9: a run's number of workers cannot change, but they can run on any number of processes. Another
K is another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import ConstantRule, ConstantSchedule, Plan
from qsr.config.load import load_config
from qsr.errors import ConfigError, TrainingError
from qsr.run.environment import write_records
from qsr.run.identity import check_run_folder, make_run_folder
from qsr.sync.topology import Topology
from tests.cli import RUN
from tests.support import Setup, adamw, run_ranks, train

PLAN = Plan(ConstantSchedule(0.01, 24), ConstantRule(4))
SETUP = Setup(PLAN, workers=4, global_batch=24, optimizer=adamw())


@pytest.mark.parametrize("stop", [8, 10], ids=["at_an_average", "within_a_round"])
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_another_number_of_workers_is_refused(workers: int, stop: int, tmp_path: Path) -> None:
    train(replace(SETUP, folder=tmp_path, stop_after=stop))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError) as refused:
        train(replace(SETUP, folder=tmp_path, workers=workers))
    assert str(refused.value) == (
        f"the checkpoint after step {stop} has 4 workers, but this run has {workers}: a run's "
        f"number of workers cannot change; to use fewer processes, set cluster.ranks to a divisor "
        f"of 4"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def train_on(rank: int, ranks: int, setup: Setup) -> Any:
    rig = train(setup, Topology(rank, ranks, rank, setup.workers))
    return rig.trainer.progress.averages, rig.parameters().tolist()


@pytest.mark.parametrize("stops", [(8, 16), (10, 15)], ids=["at_an_average", "within_a_round"])
def test_the_same_workers_go_on_with_fewer_processes(
    stops: tuple[int, int], tmp_path: Path
) -> None:
    """Machines are lost: four processes, then two, then one. The bits differ in the order of the
    sums only."""
    whole = train(SETUP)
    for ranks, stop in zip((4, 2, 1), (*stops, None), strict=True):
        setup = replace(SETUP, folder=tmp_path, stop_after=stop)
        results = run_ranks(train_on, ranks, setup)
    ((averages, parameters),) = results
    assert averages == PLAN.num_rounds == 6
    torch.testing.assert_close(torch.tensor(parameters), whole.parameters(), rtol=1e-4, atol=1e-6)


def test_a_run_folder_of_other_workers_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    """Where the experiment's file was edited, the folder is the same: its name has overrides."""
    config = load_config([*RUN, f"runs_dir={tmp_path}", "workers=4"])
    folder = check_run_folder(config, {})
    make_run_folder(folder)
    write_records(folder, config, {}, Topology(0, 1, 0, 4), "cpu")
    with pytest.raises(ConfigError) as refused:
        check_run_folder(replace(config, workers=2), {})
    assert str(refused.value) == (
        f"{folder.path} holds a run with other settings (workers: 4 -> 2): delete it, or choose "
        f"another runs_dir; the number of workers of a run is fixed: to resume with fewer "
        f"processes, set cluster.ranks to a divisor of 4"
    )
    with pytest.raises(ConfigError) as refused:
        check_run_folder(replace(config, epochs=3), {})
    assert str(refused.value).endswith("(epochs: 2 -> 3): delete it, or choose another runs_dir")


def test_other_workers_on_the_command_line_are_another_run(tmp_path: Path) -> None:
    four = load_config([*RUN, f"runs_dir={tmp_path}", "workers=4"])
    two = load_config([*RUN, f"runs_dir={tmp_path}", "workers=2"])
    assert check_run_folder(four, {}).path != check_run_folder(two, {}).path
