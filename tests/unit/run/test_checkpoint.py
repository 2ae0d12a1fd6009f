"""What is on disk, and what is made of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan
from qsr.errors import CheckpointError, TrainingError
from qsr.run.checkpoint import Checkpointer, WorkerState
from qsr.run.checkpoint_files import pack_tensors, packed_size
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from tests.faults.inject import no_file_above
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
    with no_file_above(100), pytest.raises(CheckpointError) as refused:
        save(checkpointer, 6)
    assert str(refused.value) == (
        f"the checkpoint after step 6 could not be written to {tmp_path} (rank 0: [Errno 27] File "
        f"too large); the newest checkpoint is from step 5"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000005"]
    assert checkpointer.latest() == 5
    save(checkpointer, 6)
    assert checkpointer.latest() == 6


def test_a_mistake_is_no_full_disk(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, communicator=ALONE)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(6, {"not": object()}, {}, {})


def test_the_same_step_is_written_once_in_a_session(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, communicator=ALONE)
    save(checkpointer, 5)
    inode = (tmp_path / "step_000000005").stat().st_ino
    save(checkpointer, 5)
    other = Checkpointer(tmp_path, keep=1, communicator=ALONE)
    assert other.latest() == 5
    save(other, 5)
    assert (tmp_path / "step_000000005").stat().st_ino == inode


def test_tensors_are_packed_as_the_library_does() -> None:
    base = torch.arange(40.0)
    tensors = {
        "b/view": base[8:20].view(3, 4),
        "a/other view": base[4:12],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.arange(5, dtype=torch.float16),
        "bfloat": torch.arange(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(7.0),
        "none": torch.zeros(0),
        "count": torch.tensor(2**40),
        "doubles": torch.rand(3, dtype=torch.float64),
        "bits": torch.tensor([True, False, True]),
        "ünïcode": torch.zeros(1, dtype=torch.uint8),
        "int": torch.tensor([-1], dtype=torch.int32),
    }
    packed = b"".join(pack_tensors(tensors, {"file": "step_000000001/shared.safetensors"}))
    read = safetensors.torch.load(packed)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    alike = {name: t for name, t in tensors.items() if t.dtype == torch.float32}
    metadata = {"file": "x", "ünïcode": 'a "quoted" wörd'}
    ours = b"".join(pack_tensors(alike, metadata))
    copies = {name: tensor.contiguous().clone() for name, tensor in alike.items()}
    read = safetensors.torch.load(ours)
    assert all(torch.equal(read[name], tensor) for name, tensor in alike.items())
    one = {"file": "x"}  # the library writes several in any order
    assert b"".join(pack_tensors(alike, one)) == safetensors.torch.save(copies, one)
    on_meta = {name: t.to("meta") for name, t in alike.items()}
    assert len(ours) == packed_size(on_meta, metadata)
    assert b"".join(pack_tensors({})) == safetensors.torch.save({})


def files(tmp_path: Path, **changes: Any) -> dict[str, set[str]]:
    """Tensor names by file of a run's last checkpoint."""
    setup = Setup(folder=tmp_path, net=batchnorm_net, optimizer=adamw(), **changes)
    train(setup)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["file"] == f"{folder.name}/manifest.json"
    assert manifest["workers"] == setup.workers
    assert manifest["files"] == {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    names = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            names[path.stem] = set(opened.keys())
            assert opened.metadata() == {"file": f"{folder.name}/{path.name}"}
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
    with pytest.raises(ValueError, match="a different model"):
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
