"""F13: wandb cannot be reached. The run is the same as without wandb, at its usual speed, with a
complete record of its own and one warning at the end."""

import functools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from qsr import build
from qsr.config.load import load_config
from qsr.run import tracking
from qsr.run.folder import read_rows
from qsr.run.mirror import WandbTracker
from tests.cli import ENVIRONMENT, command, folder_in, same_weights
from tests.faults.inject import needs_own_network, no_network_here
from tests.support import run_ranks, without_times

KEY = {"WANDB_API_KEY": "0" * 40}
ONLINE = ["experiment=demo/quadratic", "tracking=online"]


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's server is an address where nobody listens."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def online(digits: Path, runs: Path, *extra: str) -> list[str]:
    """The command of the run that nobody disturbed, but with wandb."""
    none = command(digits, runs, "checkpoint.every_steps=10", *extra)
    return [word.replace("tracking=none", "tracking=online") for word in none]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run without its times."""
    return without_times(read_rows(folder / "metrics.jsonl")[0])


def run_without_network(rank: int, ranks: int, settings: list[str]) -> list[str]:
    """The warnings of a run that waits 2 s for wandb at its end, instead of half a minute."""
    no_network_here()
    os.environ |= KEY
    patient = functools.partial(WandbTracker, close_seconds=2.0)
    tracking.WandbTracker = patient  # type: ignore[attr-defined,assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        build.run(load_config(settings))
    return [str(warning.message) for warning in caught]


@needs_own_network
def test_a_run_without_network_is_the_run_without_wandb(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    one = ("cluster.ranks=1", "cluster.threads_per_rank=1")
    (said,) = run_ranks(run_without_network, 1, online(digits, tmp_path, *one)[2:])
    (warning,) = said
    assert warning.startswith("wandb: still busy after 2 s; the mirror is incomplete, but metrics")
    ours, last = folder_in(tmp_path), Path("checkpoints") / "step_000000044"
    for name in ("worker_000.safetensors", "worker_001.safetensors", "shared.safetensors"):
        assert (ours / last / name).read_bytes() == (uninterrupted / last / name).read_bytes()
    for row, expected in zip(numbers(ours), numbers(uninterrupted), strict=True):
        # not to the bit: two ranks pool the statistics of BatchNorm in another order
        assert row == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@needs_own_network
def test_the_command_without_network_makes_the_same_run(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """It gives wandb half a minute at its end."""
    alone = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    done = subprocess.run(
        [*alone, *online(digits, tmp_path)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | KEY,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: wandb: ") == 1
    assert same_weights(folder_in(tmp_path), uninterrupted)


@pytest.mark.usefixtures("no_server")
def test_wandb_without_a_server_neither_delays_nor_stops_the_run(tmp_path: Path) -> None:
    started = time.monotonic()
    tracker = WandbTracker(load_config(ONLINE), tmp_path, close_seconds=2.0)
    for step in range(10_000):  # more than a pipe holds
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    assert time.monotonic() - started < 10.0  # it does not wait for the pipe
    started = time.monotonic()
    with pytest.warns(
        RuntimeWarning, match="wandb: still busy after 2 s; .*jsonl is complete"
    ) as w:
        tracker.close()
    assert len(w) == 1
    assert 2.0 <= time.monotonic() - started < 4.0


@pytest.mark.usefixtures("no_server")
def test_wandb_without_a_server_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    """wandb waits for its uploads when its process exits: that must not be the run's process."""
    program = (
        "import sys, pathlib; from qsr.config.load import load_config\n"
        "from qsr.run.mirror import WandbTracker\n"
        "config = load_config(['experiment=demo/quadratic', 'tracking=online'])\n"
        "tracker = WandbTracker(config, pathlib.Path(sys.argv[1]), close_seconds=1.0)\n"
        "tracker.log({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "tracker.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 0
    assert result.stderr.count("RuntimeWarning") == 1
