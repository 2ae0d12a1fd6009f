"""F18 on a real Slurm: runs as jobs of two nodes end with the bits of the undisturbed run, whatever
is edited while they wait."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr.cluster.slurm import JobState, query
from tests.slurm.conftest import LONG, ROOT, SMALL, Jobs, read_json, same_weights, steps
from tests.slurm.rig import Rig, wait_until

Undisturbed = Callable[..., Path]


def test_what_the_queue_knows_of_a_job(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number, with the whole name, whatever is in that; and of each task of an array."""
    monkeypatch.setenv("SLURM_CONF", rig.environment["SLURM_CONF"])
    title = f'it\'s/data.name=a|b "c", {"long " * 20}/seed_1'
    script = tmp_path / "script"
    script.write_text(f"#!/bin/bash\n#SBATCH --job-name={shlex.quote(title)}\ntrue\n")
    common = ("sbatch", "--parsable", "--hold", "--output=/dev/null")
    job = rig.run(*common, str(script)).strip()
    array = rig.run(*common, "--array=3,5", str(script)).strip()
    names = [job, f"{array}_3", f"{array}_5"]
    try:
        held = JobState("PENDING", 0, "JobHeldUser", title)
        assert query(names) == dict.fromkeys(names, held)
    finally:
        rig.run("scancel", job, array)


def test_two_nodes_through_submitit(rig: Rig, jobs: Jobs, undisturbed: Undisturbed) -> None:
    job = jobs.submit(*SMALL, ranks=1)
    rig.wait_for(job, "COMPLETED", "FAILED")
    folder = jobs.folder(*SMALL)
    assert rig.state(job) == "COMPLETED", jobs.log(folder)
    assert same_weights(folder, undisturbed(*SMALL))
    assert read_json(folder / "environment.json")["ranks"] == 2
    assert read_json(folder / "job.json")["job"] == job


@pytest.mark.slurm
def test_two_nodes_of_two_ranks_through_submitit_and_through_sbatch(
    rig: Rig, jobs: Jobs, undisturbed: Undisturbed
) -> None:
    four = ("workers=4", "epochs=2")
    one, other = jobs.submit(*four), jobs.sbatch(*four, "seed=2")
    for job, seed in ((one, "seed=1"), (other, "seed=2")):
        folder = jobs.folder(*four, seed)
        rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
        assert rig.state(job) == "COMPLETED", jobs.log(folder)
        assert same_weights(folder, undisturbed(*four, seed))


@pytest.mark.slurm
def test_requeued_by_hand(rig: Rig, jobs: Jobs, undisturbed: Undisturbed) -> None:
    job, folder = jobs.submit(*LONG), jobs.folder(*LONG)
    wait_until(lambda: len(steps(folder)) > 1, 120)
    rig.run("scontrol", "requeue", job)
    rig.wait_for(job, "PENDING", seconds=30)
    assert not (folder / "summary.json").exists()
    saved = steps(folder)[-1]
    rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert rig.state(job) == "COMPLETED", jobs.log(folder)
    assert rig.restarts(job) == 1
    assert same_weights(folder, undisturbed(*LONG))
    assert saved > 5


@pytest.mark.slurm
def test_seeds_are_elements_of_an_array(rig: Rig, jobs: Jobs, undisturbed: Undisturbed) -> None:
    """Of two ranks each."""
    array = jobs.submit_array("seed=1,2", *SMALL, ranks=2)
    for job, seed in ((f"{array}_0", "seed=1"), (f"{array}_1", "seed=2")):
        folder = jobs.folder(*SMALL, seed)
        assert read_json(folder / "job.json")["job"] == job
        rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
        assert rig.state(job) == "COMPLETED", jobs.log(folder)
        assert same_weights(folder, undisturbed(*SMALL, seed))
    assert jobs.status().count("done") == 2


@pytest.mark.slurm
def test_a_job_is_not_changed_by_an_edit_while_it_waits(
    rig: Rig, jobs: Jobs, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    for name in ("qsr", "scripts", "configs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    rig.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        job = jobs.submit(*SMALL, ranks=1, root=project)
        for path in (project / "qsr").rglob("*.py"):
            path.write_text("an edit that does not even parse")
    finally:
        rig.run("scontrol", "update", "PartitionName=low", "State=UP")
    rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    folder = jobs.folder(*SMALL)
    assert rig.state(job) == "COMPLETED", jobs.log(folder)
    assert same_weights(folder, undisturbed(*SMALL))
