"""What is on disk, and what is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan
from qsr.checkpoint import Checkpointer, CheckpointError, WorkerState
from qsr.distributed import Communicator, Topology
from qsr.monitor import TrainingError
from tests.support import CPU, Setup, adamw, batchnorm_net, build, linear_net, train

ALONE = Communicator(Topology(0, 1, 0, 1), CPU, 10.0)
LOCAL = Plan(ConstantSchedule(0.1, 12), ConstantRule(4))


def save(checkpointer: Checkpointer, step: int) -> None:
    own = WorkerState({"a": torch.full((3,), float(step))}, {"scaler": {}})
    checkpointer.save(step, {"step": step}, {"b": torch.tensor([1.0])}, {0: own})


def test_round_trip_and_retention(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2, communicator=ALONE)
    assert checkpointer.latest() is None
    for step in (5, 10, 100):
        save(checkpointer, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000000010",
        "step_000000100",
    ]
    assert checkpointer.latest() == 100
    assert checkpointer.read_run(100) == {"step": 100}
    state = checkpointer.read_worker(100, 0)
    assert {name: t.tolist() for name, t in state.tensors.items()} == {"a": [100.0] * 3, "b": [1.0]}
    assert state.values == {"scaler": {}}


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2, communicator=ALONE)
    save(checkpointer, 5)
    half = tmp_path / "step_000000010.partial"
    half.mkdir()
    (half / "worker_000.safetensors").write_bytes(b"half")
    assert checkpointer.latest() == 5
    save(checkpointer, 10)  # the leftover is in nobody's way
    assert checkpointer.latest() == 10
    assert not half.exists()


def test_a_failed_write_leaves_the_last_one_alone(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, communicator=ALONE)
    save(checkpointer, 5)
    with pytest.raises(CheckpointError, match="the ones before are untouched"):
        checkpointer.save(6, {"not": object()}, {}, {})
    assert checkpointer.latest() == 5


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, communicator=ALONE)
    save(checkpointer, 5)
    path = tmp_path / "step_000000005" / "worker_000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step_000000005 cannot be read"):
        checkpointer.read_worker(5, 0)
    (tmp_path / "step_000000005" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpointer.read_run(5)


def files(tmp_path: Path, **changes: Any) -> dict[str, set[str]]:
    """Tensor names by file of a run's last checkpoint."""
    setup = Setup(folder=tmp_path, net=batchnorm_net, optimizer=adamw(), **changes)
    train(setup)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())["bytes"]
    assert manifest == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    }
    names = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            names[path.stem] = set(opened.keys())
    return names


PARAMETERS = {f"parameters/{name}" for name, _ in batchnorm_net().named_parameters()}
BUFFERS = {f"buffers/{name}" for name, _ in batchnorm_net().named_buffers()}
OPTIMIZER = {
    f"optimizer/{name}/{key}"
    for name, _ in batchnorm_net().named_parameters()
    for key in ("step", "exp_avg", "exp_avg_sq")
}


def test_after_an_average_parameters_are_stored_once(tmp_path: Path) -> None:
    assert files(tmp_path, plan=LOCAL) == {
        "shared": PARAMETERS,
        "worker_000": OPTIMIZER | BUFFERS,
        "worker_001": OPTIMIZER | BUFFERS,
    }


def test_within_a_round_every_worker_has_its_own(tmp_path: Path) -> None:
    assert files(tmp_path, plan=LOCAL, stop_after=6) == {
        "shared": set(),
        "worker_000": PARAMETERS | OPTIMIZER | BUFFERS,
        "worker_001": PARAMETERS | OPTIMIZER | BUFFERS,
    }


def test_data_parallel_workers_share_their_optimizer_too(tmp_path: Path) -> None:
    plan = Plan(ConstantSchedule(0.1, 12), EveryStepRule("gradients"))
    assert files(tmp_path, plan=plan) == {
        "shared": PARAMETERS | OPTIMIZER,
        "worker_000": BUFFERS,
        "worker_001": BUFFERS,
    }


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    train(Setup(LOCAL, folder=tmp_path, stop_after=6))
    with pytest.raises(TrainingError, match="other settings"):
        train(Setup(LOCAL, folder=tmp_path, config_hash="f" * 16))
    with pytest.raises(ValueError, match="another model"):
        train(Setup(LOCAL, folder=tmp_path, net=batchnorm_net))


def test_memory_format_survives(tmp_path: Path) -> None:
    def net() -> torch.nn.Module:
        return batchnorm_net().to(memory_format=torch.channels_last)

    setup = Setup(LOCAL, folder=tmp_path, net=net, optimizer=adamw(), stop_after=6)
    train(setup)
    rig = build(setup)
    rig.trainer.restore()
    for worker in rig.workers:
        for parameter, state in worker.optimizer.state.items():
            assert state["exp_avg"].stride() == parameter.stride()
        (convolution,) = [p for p in worker.model.module.parameters() if p.dim() == 4]
        assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_the_averaged_model_loads_into_the_bare_network(tmp_path: Path) -> None:
    rig = train(Setup(LOCAL, folder=tmp_path))
    bare = linear_net()
    bare.load_state_dict(rig.evaluator.model.state_dict())
    parameters = torch.cat([p.detach().flatten() for p in bare.parameters()])
    assert torch.equal(parameters, rig.parameters())
