"""F18: code or settings change between submission and restart, or between machines. A submitted job
runs a copy of the code made at submission. Elsewhere changed code is a warning; changed settings
are refused, and so is a rank whose code differs from rank 0's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qsr.cluster.group import join_process_group
from qsr.config.load import load_config, run_folder, to_dict
from qsr.errors import ConfigError
from qsr.run.environment import code_that_runs
from qsr.run.folder import RunFolder
from qsr.run.identity import check_run_folder
from qsr.run.snapshot import code_hash
from qsr.sync.topology import Topology
from tests.cli import ENVIRONMENT, ROOT, RUN, folder_in
from tests.support import CPU, free_port, run_ranks

SETTINGS = (*RUN, "cluster.ranks=1", "cluster.threads_per_rank=1", "data.loader=torchvision")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the code that can be edited."""
    for name in ("qsr", "scripts", "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "project"


def run(
    project: Path, digits: Path, *settings: str, script: str = "train.py", code: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A run in runs/ beside the project, by its code or by a copy of that."""
    code = code or project
    folders = (f"data.root={digits}", f"runs_dir={project.parent / 'runs'}")
    return subprocess.run(
        [sys.executable, str(code / "scripts" / script), *SETTINGS, *folders, *settings],
        env=ENVIRONMENT | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.slow
def test_other_code_is_warned_of_and_recorded(project: Path, digits: Path) -> None:
    assert run(project, digits, "stop_after_steps=3").stderr == ""
    environment = folder_in(project.parent / "runs") / "environment.json"
    before = json.loads(environment.read_text())["code"]
    with (project / "qsr" / "train" / "losses.py").open("a") as file:
        file.write("# an edit\n")
    again = run(project, digits, "stop_after_steps=6")
    record = json.loads(environment.read_text())
    assert record["code"] != before
    assert record["earlier_code"] == [before]
    assert again.returncode == 0
    assert again.stderr == (
        f"warning: {environment.parent} was started with different code (hash of qsr/ was "
        f"{before}, is now {record['code']}): the run resumes, but its result may differ\n"
    )


@pytest.mark.slow  # test_own_parts.py and test_submit.py run a job from its copy
def test_the_code_of_a_submission_is_a_copy(project: Path, digits: Path) -> None:
    done = run(project, digits, "stop_after_steps=3", script="submit.py")
    assert done.returncode == 0, done.stderr
    (copy,) = (project.parent / "runs" / ".snapshots").iterdir()
    losses = (copy / "qsr" / "train" / "losses.py").read_text()
    (project / "qsr" / "train" / "losses.py").write_text("an edit that does not even parse")
    assert (copy / "qsr" / "train" / "losses.py").read_text() == losses
    requeued = run(project, digits, "stop_after_steps=6", code=copy)
    assert (requeued.returncode, requeued.stderr) == (0, "")
    assert "stopped after step 6" in requeued.stdout


def test_a_machine_with_other_code_is_refused(project: Path, digits: Path) -> None:
    """Its checkout is older: it would train along and end with other weights, without a word."""
    losses = project / "qsr" / "train" / "losses.py"
    losses.write_text(losses.read_text() + "# an edit\n")
    folders = (f"data.root={digits}", f"runs_dir={project.parent / 'runs'}")
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(code / "scripts" / "train.py"), *RUN, *folders],
            env=ENVIRONMENT | meeting | {"RANK": str(rank), "PYTHONPATH": str(code)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, code in enumerate((ROOT, project))
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 2
        assert errors == (
            f"refused: rank 1 runs different code than rank 0 (qsr: {code_hash(ROOT)} -> "
            f"{code_hash(project)}): install the same qsr, Python and packages on all machines\n"
        )
    assert not list((project.parent / "runs").rglob("config.yaml"))


def with_other_packages(rank: int, ranks: int, name: str) -> tuple[int, str] | None:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    changes = {name: f"of rank {rank}"} if name else {}
    return communicator.first_difference(code_that_runs() | changes)


@pytest.mark.parametrize("name", ["qsr", "python", "torch", "nvidia-dali-cuda130", ""])
def test_what_must_be_the_same_on_all_machines(name: str) -> None:
    found = run_ranks(with_other_packages, 2, name)
    assert found == [(1, f"{name}: of rank 0 -> of rank 1") if name else None] * 2


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("checkpoint.every_steps=7", True),
        ("cluster.timeout_seconds=30", True),
        ("tracking.log_every_steps=3", True),
        ("evaluation.batch=50", True),
        ("cluster.ranks=2", True),  # on other processes: the same run
        ("epochs=3", False),
        ("schedule.peak_lr=0.3", False),
        ("sync.alpha=0.5", False),
        ("workers=4", False),
        ("model=small_vit", False),
    ],
)
def test_what_may_change_between_two_sessions(setting: str, allowed: bool, tmp_path: Path) -> None:
    """As if a file of configs/ had been edited: the same command, in the same folder."""
    base = [*SETTINGS, f"runs_dir={tmp_path}"]
    config = load_config(base)
    folder = RunFolder(run_folder(config))
    folder.path.mkdir(parents=True)
    before = load_config([*base, setting])
    folder.config.write_text(yaml.safe_dump(to_dict(before)))
    if allowed:
        check_run_folder(config, {})
    else:
        with pytest.raises(ConfigError, match=f"other settings .*{setting.partition('=')[0]}"):
            check_run_folder(config, {})
