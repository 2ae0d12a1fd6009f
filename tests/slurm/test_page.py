"""docs/cluster.md on a real Slurm: its site file, its trial and its calibration."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster_page import SITE, commands
from tests.slurm.conftest import ROOT, RUN, Jobs, read_json
from tests.slurm.rig import Rig

HERE = {
    "partition": "low",
    "gpus_per_node": 0,
    "ranks_per_node": 2,
    "cpus_per_task": 1,
    "setup": [],
    "python": None,
    "network_interface": "lo",
}
"""What the machines of the tests need instead."""


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_page_leads_to_a_job_that_trains_and_to_its_hours(
    rig: Rig, jobs: Jobs, digits: Path, tmp_path: Path
) -> None:
    site = yaml.safe_load(SITE) | HERE
    del site["account"]
    (tmp_path / "qsr" / "cluster").mkdir(parents=True)
    (tmp_path / "qsr" / "cluster" / "mine.yaml").write_text(yaml.safe_dump(site))
    jobs.environment["XDG_CONFIG_HOME"] = str(tmp_path)
    trial = [word for word in commands("submit")[0] if not word.startswith("cluster.gpus")]
    here = [*RUN[2:], f"data.root={digits}", f"runs_dir={jobs.runs}"]
    submit, plan = (str(ROOT / "scripts" / f"{name}.py") for name in ("submit", "plan"))

    printed = jobs.call(sys.executable, submit, *trial, *here)
    job = re.search(r"  job (\d+)", printed)
    assert job is not None, printed
    assert "no hours: no speeds are given" in printed
    rig.wait_for(job[1], "COMPLETED", "FAILED", seconds=300)
    (folder,) = jobs.runs.glob("demo/quadratic/seed_1")
    assert rig.state(job[1]) == "COMPLETED", jobs.log(folder)
    environment = read_json(folder / "environment.json")
    assert (environment["ranks"], read_json(folder / "summary.json")["steps"]) == (4, 330)
    assert "demo/quadratic" in jobs.status()

    (words,) = commands("plan")
    measured = [word for word in words if not word.startswith("experiment=")]
    srun = ("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    calibrate = [*srun, sys.executable, plan, *measured, trial[0], *RUN[2:]]
    for _ in range(5):  # on a busy machine
        done = subprocess.run(
            calibrate, env=jobs.environment, capture_output=True, text=True, check=False
        )
        if "measure again" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("use it with speed=mine: ") == 1
    speed = yaml.safe_load((tmp_path / "qsr" / "speed" / "mine.yaml").read_text())
    assert (speed["machines"], speed["ranks_per_machine"]) == (2, 2)
    printed = jobs.call(sys.executable, submit, "--dry-run", *trial, *here, "speed=mine", "seed=2")
    assert re.search(r"global batch 64; [\d.e-]+ h \(predicted\)", printed), printed
