"""F12: the run folder cannot be used. The run is refused before training, in one line."""

from pathlib import Path
from typing import Any

import pytest

from qsr import build
from qsr.config.load import load_config, run_folder
from qsr.errors import ConfigError
from qsr.run.identity import check_run_folder
from tests.cli import RUN
from tests.faults.inject import mount_here, needs_mounts
from tests.support import run_ranks


def a_run(digits: Path, runs: Path, *more: str) -> list[str]:
    return [*RUN, f"data.root={digits}", f"runs_dir={runs}", "data.loader=torchvision", *more]


def prepare_read_only(rank: int, ranks: int, runs: Path, settings: list[str]) -> str:
    mount_here(runs, "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        build.prepare(load_config(settings))
    except ConfigError as error:
        return str(error)
    return "went on"


@needs_mounts
def test_a_read_only_disk_is_refused(digits: Path, tmp_path: Path) -> None:
    """Root may write anywhere, but not here."""
    settings = a_run(digits, tmp_path)
    (message,) = run_ranks(prepare_read_only, 1, tmp_path, settings)
    folder = run_folder(load_config(settings))
    start = f"{folder} cannot be written: choose another runs_dir ([Errno 30] "
    assert message.startswith(start)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["runs", "runs/demo", "runs/demo/quadratic"])
def test_a_file_in_the_place_of_a_folder_is_refused(
    digits: Path, tmp_path: Path, where: str
) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be written: choose another runs_dir \("):
        build.prepare(load_config(a_run(digits, tmp_path / "runs")))
    assert path.read_text() == "a file"


def run_with_a_blind_rank(rank: int, ranks: int, runs: Path, settings: list[str]) -> Any:
    """Rank 1 has a disk of its own in the place of the common folder, as a second machine does
    where the folder is not shared."""
    if rank == 1:
        mount_here(runs, "-t", "tmpfs", "tmpfs")
    try:
        build.run(load_config(settings))
    except ConfigError as error:
        return str(error), [path.name for path in runs.rglob("*") if path.is_file()]
    return "went on"


@needs_mounts
def test_a_rank_that_does_not_see_the_folder_is_noticed_at_the_start(
    digits: Path, tmp_path: Path
) -> None:
    settings = a_run(digits, tmp_path, "cluster.ranks=2")
    results = run_ranks(run_with_a_blind_rank, 2, tmp_path, settings)
    message = (
        f"rank 1 does not see rank 0's {run_folder(load_config(settings))}: choose a runs_dir that "
        f"all machines share"
    )
    assert results == [(message, ["run.lock"]), (message, [])]


def test_a_disk_that_is_not_there_is_not_made() -> None:
    """Root could make the folder, on the disk of the system."""
    config = load_config(["experiment=demo/quadratic", "runs_dir=/no-such-disk/runs"])
    with pytest.raises(ConfigError, match=r"^runs_dir=/no-such-disk/runs: there is no /no-such-di"):
        check_run_folder(config, {})
