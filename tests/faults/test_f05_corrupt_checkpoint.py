"""F5: a damaged checkpoint is recognized before any of it is used, and the previous one is used
instead."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan
from qsr.cluster.group import join_process_group
from qsr.errors import CheckpointError
from qsr.run.checkpoint import Checkpointer
from qsr.sync.topology import Topology
from tests.faults.small import checkpointer, flip_byte, holds, rewrite_manifest, save, steps_in
from tests.support import CPU, Setup, adamw, batchnorm_net, run_ranks, sgd, train

FILES = (
    "manifest.json",
    "shared.safetensors",
    "state.json",
    "worker_000.json",
    "worker_000.safetensors",
    "worker_001.json",
    "worker_001.safetensors",
)
OLD, NEW = "step_000000005", "step_000000010"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after steps 5 and 10."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (5, 10):
        save(checkpointer(folder), step)
    assert tuple(sorted(path.name for path in (folder / NEW).iterdir())) == FILES
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def assert_falls_back(folder: Path, because: str, capfd: pytest.CaptureFixture[str]) -> None:
    session = checkpointer(folder)
    assert session.latest() == 5
    assert holds(session, 5)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{folder / NEW} was skipped ({because}")
    assert line.endswith("; the run resumes from step 5")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_length_is_recognized(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / NEW / name
    content = path.read_bytes()
    for cut in (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\0"):
        path.write_bytes(cut)
        assert_falls_back(folder, name, capfd)
    path.unlink()
    assert_falls_back(folder, f"{name}: No such file or directory)", capfd)
    path.mkdir()
    assert_falls_back(folder, f"{name}: Is a directory)", capfd)
    path.rmdir()
    path.write_bytes(content)
    assert checkpointer(folder).latest() == 10


def test_a_flipped_bit_is_recognized(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """100 places over all files, so that long files are hit more often, as on a real disk."""
    places = [
        (name, position)
        for name in FILES
        for position in range((folder / NEW / name).stat().st_size)
    ]
    draw = random.Random(5)
    hit = set()
    for name, position in draw.sample(places, 100):
        bit = draw.randrange(8)
        flip_byte(folder / NEW / name, position, bit)
        assert_falls_back(folder, name, capfd)
        flip_byte(folder / NEW / name, position, bit)
        hit.add(name)
    assert hit == set(FILES)
    assert checkpointer(folder).latest() == 10


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
@pytest.mark.parametrize("manifest_too", [False, True])
def test_files_of_two_workers_exchanged_are_recognized(
    folder: Path, kind: str, manifest_too: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"worker_00{index}.{kind}" for index in (0, 1)]
    exchange(*(folder / NEW / name for name in names))
    reason = f"{names[0]} has the wrong checksum"
    if manifest_too:  # as if a rank had written another worker's state
        rewrite_manifest(folder / NEW)
        reason = f"{names[0]} belongs to another step or worker"
    assert_falls_back(folder, reason, capfd)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_recognized(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / OLD / name, folder / NEW / name)
    assert_falls_back(folder, name, capfd)
    if name != "manifest.json":
        rewrite_manifest(folder / NEW)
        assert_falls_back(folder, f"{name} belongs to another step or worker", capfd)


def test_a_checkpoint_under_the_name_of_another_step_is_recognized(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / NEW)
    shutil.copytree(folder / OLD, folder / NEW)
    assert_falls_back(folder, "manifest.json belongs to step_000000005", capfd)


def test_a_file_that_the_manifest_does_not_know_is_recognized(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / NEW / "manifest.json"
    path.write_text(path.read_text().replace('"workers": 2', '"workers": 1'))
    assert_falls_back(folder, "manifest.json has the wrong checksum", capfd)
    rewrite_manifest(folder / NEW)
    assert_falls_back(folder, "manifest.json does not list every file", capfd)


def test_where_none_is_whole_the_run_is_refused(folder: Path) -> None:
    """It never starts again from the first step by itself."""
    (folder / NEW / "state.json").unlink()
    flip_byte(folder / OLD / "shared.safetensors", 200)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError) as refused:
        checkpointer(folder).latest()
    assert str(refused.value) == (
        f"every checkpoint in {folder} is damaged (step_000000010: state.json: No such file or "
        f"directory; step_000000005: shared.safetensors has the wrong checksum); restore one from "
        f"a copy, or delete this folder to train from the first step"
    )
    assert sorted(folder.rglob("*")) == before


def test_damaged_checkpoints_do_not_count_among_those_that_stay(folder: Path) -> None:
    for step in (15, 20, 30):
        save(checkpointer(folder, keep=9), step)
    flip_byte(folder / "step_000000015" / "state.json", 20)
    flip_byte(folder / "step_000000020" / "state.json", 20)
    flip_byte(folder / "step_000000030" / "state.json", 20)
    session = checkpointer(folder, keep=2)
    assert session.latest() == 10
    save(session, 20)  # with other settings of checkpoint.every_steps: 15 is not written again
    assert steps_in(folder) == [10, 20]
    assert checkpointer(folder).latest() == 20
    assert holds(session, 20)


def latest_of(rank: int, ranks: int, folder: Path) -> tuple[int | None, str]:
    communicator = join_process_group(Topology(rank, ranks, rank, 2), CPU, 60.0)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return Checkpointer(folder, 2, communicator).latest(), said.getvalue()


def test_ranks_agree_when_one_of_them_finds_damage(folder: Path) -> None:
    """Each reads its own worker's file only."""
    flip_byte(folder / NEW / "worker_001.safetensors", 120)
    reason = "worker_001.safetensors has the wrong checksum"
    assert run_ranks(latest_of, 2, folder) == [
        (5, f"{folder / NEW} was skipped ({reason}); the run resumes from step 5\n"),
        (5, ""),
    ]


LOCAL = Plan(ConstantSchedule(0.1, 24), ConstantRule(7))
GRADIENTS = Plan(ConstantSchedule(0.1, 24), EveryStepRule("gradients"))


@pytest.mark.parametrize(
    ("plan", "damage"),
    [
        (LOCAL, lambda newest: flip_byte(newest / "worker_001.safetensors", -1)),
        (LOCAL, lambda newest: (newest / "worker_000.json").unlink()),
        (GRADIENTS, lambda newest: flip_byte(newest / "shared.safetensors", -1)),
    ],
    ids=["flipped", "deleted", "shared"],
)
def test_the_run_comes_to_the_same_end_from_the_checkpoint_before(
    plan: Plan, damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    setup = Setup(plan, net=batchnorm_net, optimizer=adamw(), checkpoint_every=5)
    whole = train(setup)
    train(replace(setup, folder=tmp_path, stop_after=15))
    damage(tmp_path / "checkpoints" / "step_000000015")
    resumed = train(replace(setup, folder=tmp_path))
    assert resumed.loader.requested[0] == whole.loader.requested[10 * 2]
    assert torch.equal(resumed.parameters(), whole.parameters())
    assert steps_in(tmp_path / "checkpoints") == [20, 24]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_stay_as_asked_for(keep: int, tmp_path: Path) -> None:
    setup = Setup(LOCAL, optimizer=sgd(), checkpoint_every=5, keep=keep, folder=tmp_path)
    train(setup)
    assert steps_in(tmp_path / "checkpoints") == [5, 10, 15, 20, 24][-keep:]
