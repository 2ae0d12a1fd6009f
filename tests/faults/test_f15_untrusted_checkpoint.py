"""F15: no file in a run folder can make a resuming run execute code."""

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import build
from qsr.config.load import load_config, run_folder
from qsr.errors import CheckpointError, ConfigError
from qsr.run.checkpoint import Checkpointer
from tests.cli import RUN
from tests.faults.small import checkpointer, rewrite_manifest, save


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._marker,)


def a_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Attack(marker)))


def a_torch_file(path: Path, marker: Path) -> None:
    torch.save({"state": Attack(marker)}, path)


def a_yaml_tag(path: Path, marker: Path) -> None:
    path.write_text(f'!!python/object/apply:os.system ["touch {marker}"]\n')


ATTACKS = (a_pickle, a_torch_file, a_yaml_tag)


@pytest.fixture(scope="module")
def settings(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a run that has stopped after 4 of its 44 steps, with two checkpoints."""
    runs = tmp_path_factory.mktemp("untrusted") / "runs"
    stopped = [
        *(*RUN, f"data.root={digits}", f"runs_dir={runs}", "data.loader=torchvision"),
        *("cluster.ranks=1", "cluster.threads_per_rank=1", "checkpoint.every_steps=2"),
    ]
    assert isinstance(build.run(load_config([*stopped, "stop_after_steps=4"])), build.Stopped)
    return stopped


def read_all(session: Checkpointer, step: int) -> None:
    session.read_run(step)
    for worker in (0, 1):
        session.read_worker(step, worker)


@pytest.mark.parametrize("manifest_too", [False, True], ids=["alone", "manifest_too"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_file_of_a_checkpoint_runs_code(
    attack: Callable[[Path, Path], None], manifest_too: bool, tmp_path: Path
) -> None:
    """Also where the manifest vouches for it, and where it is read without a look at that."""
    folder, marker = tmp_path / "checkpoints", tmp_path / "marker"
    for step in (5, 10):
        save(checkpointer(folder), step)
    newest = folder / "step_000000010"
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 7
    for name in names:
        content = (newest / name).read_bytes()
        attack(newest / name, marker)
        if manifest_too and name != "manifest.json":
            rewrite_manifest(newest)
        session = checkpointer(folder)
        assert session.latest() == 5
        if name != "manifest.json":
            with pytest.raises(CheckpointError, match=f"cannot be read .{name}"):
                read_all(session, 10)
        assert not marker.exists(), name
        (newest / name).write_bytes(content)
        if manifest_too and name != "manifest.json":
            rewrite_manifest(newest)
    assert checkpointer(folder).latest() == 10


@pytest.fixture
def opened() -> Iterator[list[Path]]:
    """The files that Python has opened since."""
    paths: list[Path] = []
    listening = True

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | Path):
            paths.append(Path(arguments[0]))

    sys.addaudithook(listen)  # for good: there is no way to take it off
    yield paths
    listening = False


def resume(settings: list[str]) -> str | None:
    """The one line in which the session was refused."""
    try:
        build.run(load_config([*settings, "stop_after_steps=5"]))
    except ConfigError as error:
        return str(error)
    return None


def test_no_other_file_of_the_run_folder_runs_code(
    settings: list[str], tmp_path: Path, opened: list[Path]
) -> None:
    folder = run_folder(load_config(settings))
    kept = Path(shutil.copytree(folder, tmp_path / "kept"))
    opened.clear()
    assert resume(settings) is None
    names = {
        path.relative_to(folder).as_posix()
        for path in opened
        if path.is_relative_to(folder) and (kept / path.relative_to(folder)).is_file()
    }
    names = {name for name in names if not name.startswith("checkpoints/")}
    assert names == {
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors.partial",
        "run.lock",
        "summary.json.partial",
    }
    refused = set()
    for name in sorted({*names, "summary.json"}):
        for attack in ATTACKS if name == "config.yaml" else ATTACKS[:1]:
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            marker = tmp_path / "marker"
            attack(folder / name, marker)
            message = resume(settings)
            assert not marker.exists(), name
            if message is not None:
                assert message.startswith(f"{folder / name} cannot be read")
                assert "\n" not in message
                refused.add(name)
    assert refused == {"config.yaml", "data.json", "summary.json"}
