"""What all tests share."""

import fcntl
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# one thread per test process: the suite runs in parallel processes on few cores
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

from qsr.data import ImageFolder, Loader, make_loader
from qsr.data.prepare.digits import prepare_digits
from qsr.data.transforms import EvalTransform, TrainTransform
from tests.cli import call, command, folder_in
from tests.fault_record import FaultRecord
from tests.image_trees import write_tree
from tests.killing import SCRIPT
from tests.support import CPU

# a test that takes longer on a busy machine has not failed
hypothesis.settings.register_profile("qsr", deadline=None)
hypothesis.settings.load_profile("qsr")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-golden", action="store_true", help="write the golden files anew from this run"
    )
    parser.addoption(
        "--record-faults", action="store_true", help="count outcomes into results/faults.json"
    )


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: three test processes on two cores, because many tests wait for other processes."""
    return 3 * (os.cpu_count() or 1) // 2 or 1


def pytest_configure(config: pytest.Config) -> None:
    # in the background of a script these are ignored, and so they would be by all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    in_a_worker = hasattr(config, "workerinput")  # of pytest-xdist, whose controller records
    if config.getoption("--record-faults") and not in_a_worker:
        config.pluginmanager.register(FaultRecord())


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A run in this process takes all cores, and with another number of threads sums differ in
    their last bits: later tests must not see it."""
    torch.set_num_threads(1)


def made_once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process that needs it makes, and all others read."""
    together = folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        together = together.parent
    folder, done = together / name, together / f"{name}.done"
    with (together / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set."""
    return made_once(tmp_path_factory, "digits", prepare_digits)


@pytest.fixture(scope="session")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes that nobody disturbed."""

    def run(runs: Path) -> None:
        done = call(command(digits, runs, "checkpoint.every_steps=10"))
        assert done.returncode == 0, done.stderr
        assert "top-1" in done.stdout

    return folder_in(made_once(tmp_path_factory, "uninterrupted", run))


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Root of a tree that the test may damage."""
    write_tree(tmp_path / "photos", classes=2, train=6, val=2)
    return tmp_path / "photos"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs scripts/prepare.py in this process; returns its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    return run


@pytest.fixture(params=["dali", "torchvision"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both loaders, one after the other."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


@pytest.fixture(scope="session")
def new_loader() -> Iterator[Callable[..., Loader]]:
    """Makes loaders for 16 images a batch that live to the end of the tests."""
    made: list[Loader] = []

    def make(
        kind: Any, dataset: ImageFolder, transform: TrainTransform | EvalTransform, **options: Any
    ) -> Loader:
        settings: dict[str, Any] = {"batch_size": 16, "device": CPU, "threads": 2, **options}
        made.append(make_loader(kind, dataset, transform, **settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()
