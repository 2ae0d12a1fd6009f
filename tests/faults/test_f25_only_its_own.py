"""F25: a run starts within someone else's job, array or folder. It requeues, cancels, deletes and
overwrites only what it or its submission created."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsr.config.load import load_config, run_folder
from qsr.errors import ConfigError
from qsr.ops.jobs import check_submissions, write_job
from qsr.run.snapshot import snapshot_folder, take_snapshot
from tests.cli import ROOT, RUN, program

TASK = {
    "SLURM_JOB_ID": "103",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node1",
}
"""Rank 0 of a step of job 103, whoever submitted it."""
OWN = TASK | {"QSR_JOB": "103"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "101", "SLURM_ARRAY_TASK_ID": "2"}
LAST = {"SLURM_JOB_ID": "101", "SLURM_ARRAY_JOB_ID": "101", "SLURM_ARRAY_TASK_ID": "5"}
"""Slurm gives the last task of an array the number of the array itself."""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Slurm's commands: every job that one asks for runs; what is asked of scontrol is noted. The
    real ones are in tests/slurm."""
    program(tmp_path / "bin", "squeue", 'echo "${4#*=}|RUNNING|0|None|qsr|"')
    program(tmp_path / "bin", "scontrol", f'echo "$*" >> {tmp_path}/asked')
    return tmp_path


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        (OWN, "requeue 103"),
        (OWN | ARRAY, "requeue 101_2"),
        (OWN | LAST | {"QSR_JOB": "101"}, "requeue 101_5"),  # 101 would be the whole array
        (TASK, None),  # srun by hand, or in a script of somebody's own
        (TASK | ARRAY, None),
        (TASK | LAST, None),
        (TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),  # salloc
        (TASK | {"QSR_JOB": "99"}, None),  # another job, submitted from within one of ours
        (TASK | {"QSR_JOB": ""}, None),
        (OWN | {"RANK": "1", "WORLD_SIZE": "2"}, None),  # torchrun's rank 0 does
    ],
)
def test_a_stopped_run_requeues_its_own_job_alone(
    task: dict[str, str], asked: str | None, slurm: Path
) -> None:
    own = {name: text for name, text in os.environ.items() if not name.startswith("SLURM")}
    environment = (
        own | {"PATH": f"{slurm}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | task
    )
    ask = "import sys; from qsr.cluster.slurm import stopped_status; sys.exit(stopped_status())"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 75
    log = slurm / "asked"
    assert (log.read_text().strip() if log.exists() else None) == asked
    if asked is not None:
        assert done.stderr == f"job {asked.split()[1]}: requeued\n"
    elif "RANK" not in task:
        assert "not requeued: it was not submitted by qsr submit or slurm" in done.stderr
        assert done.stderr.count("\n") == 1


def started(script: Path, tools: Path, *settings: str, restarts: int = 0) -> tuple[str, str]:
    """Start a job's script as Slurm does: what it hands down to the ranks as the job that is its
    own, and the code that they run."""
    program(tools, "python", f'exec {sys.executable} "$@"')
    program(tools, "srun", 'echo "${QSR_JOB:-none}"; echo "$6"')
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "43",
        "SLURM_JOB_NAME": "qsr",
        "SLURM_CLUSTER_NAME": "here",
        "SLURM_RESTART_COUNT": str(restarts),
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", str(script), *settings], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own, code = done.stdout.splitlines()[-2:]
    return own, code


def test_the_batch_script_runs_its_own_jobs_copy_of_the_code(digits: Path, tmp_path: Path) -> None:
    """In a folder whose name Hydra takes in quotes alone, and in which an earlier job, and one of
    another cluster, had the same number."""
    runs, script = tmp_path / "lr=0.1, my runs", tmp_path / "job00043" / "slurm_script"
    script.parent.mkdir()
    shutil.copy(ROOT / "slurm" / "train.sbatch", script)
    strange = runs / ".snapshots" / "0123456789abcdef"
    strange.mkdir(parents=True)
    own, foreign = (strange.with_name(f"job_{cluster}_43") for cluster in ("here", "there"))
    for link in (own, foreign):
        link.symlink_to(strange.name)
    settings = (*RUN, f"data.root={digits}", f'runs_dir="{runs}"')
    code = snapshot_folder(runs)
    as_it_was = ("43", f"{code}/scripts/train.py")
    assert started(script, tmp_path / "bin", *settings) == as_it_was
    assert (own.resolve(), foreign.resolve()) == (code, strange)
    record = run_folder(load_config(list(settings))) / "job.json"
    assert json.loads(record.read_text())["job"] == "43"
    record.unlink()
    assert started(script, tmp_path / "bin", *settings, restarts=1) == as_it_was
    assert not record.exists()  # what was requeued needs nothing of the checkout
    for way in ("bash", "source"):  # the job's script is somebody's own
        script.write_text(f'{way} slurm/train.sbatch "$@"')
        of_others = started(script, tmp_path / "bin", *settings, restarts=1)
        assert of_others == ("none", as_it_was[1])


@pytest.mark.parametrize(
    ("number", "title", "refused"),
    [
        ("103", "qsr", True),
        ("101_2", "qsr", True),
        ("103", "someone else's", False),  # on another cluster, or many jobs later
    ],
)
def test_a_job_of_the_same_number_is_not_taken_for_the_runs_own(
    number: str, title: str, refused: bool, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{slurm}/bin:{os.environ['PATH']}")
    config = load_config([*RUN, f"runs_dir={slurm}"])
    folder = run_folder(config)
    folder.mkdir(parents=True)
    write_job(config, number, title, slurm, None, "log")
    if refused:
        told = rf"already has job {number} \(RUNNING\), .*scancel {number} first$"
        with pytest.raises(ConfigError, match=told):
            check_submissions([config])
    else:
        assert check_submissions([config])[0].path == folder


@pytest.mark.parametrize("text", ["{}", "[]", '{"a', '{"job": 7}', '{"job": "7,8"}', "[" * 100_000])
def test_a_record_of_another_shape_is_named(text: str, tmp_path: Path) -> None:
    config = load_config([*RUN, f"runs_dir={tmp_path}"])
    record = run_folder(config) / "job.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    with pytest.raises(
        ConfigError, match=r"job.json .*: make sure that no job of the run is queued, then"
    ):
        check_submissions([config])
    assert record.read_text() == text


def test_copies_that_were_begun_and_left_are_removed_if_they_are_ours(tmp_path: Path) -> None:
    folder = tmp_path / ".snapshots"
    name = ".0123456789abcdef.a1b2c3d4"
    left, young, named, of_another = (
        folder / name, folder / name.replace("a1", "b1"), folder / ".nfs0001",
        folder / name.replace("a1", "c1"),
    )  # fmt: skip
    for path in (left, young, named, of_another):
        (path / "qsr").mkdir(parents=True)
        (path / "qsr" / "a.py").touch()
    if os.geteuid() == 0:
        os.chown(of_another, 65534, 65534)
    else:
        of_another = young  # it takes root to have one
    for path in (left, named, folder / name.replace("a1", "c1")):
        os.utime(path, (time.time() - 90_000,) * 2)
    copy = take_snapshot(tmp_path)
    assert not left.exists()
    there = {young, named, of_another, copy}
    assert there <= set(folder.iterdir())
