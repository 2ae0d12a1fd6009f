"""A Slurm of two nodes, and runs as its jobs."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsr.config.load import CONFIG_DIR, load_config, run_folder
from tests.slurm.rig import Rig, missing_reason, wait_until

ROOT = CONFIG_DIR.parent
RUN = (
    "experiment=demo/quadratic",
    "schedule.warmup_epochs=1",
    "tracking=none",
    "cluster.threads_per_rank=1",  # as many on every rank, wherever it is: the same bits
    "cluster.device=cpu",
)
SMALL = ("workers=2", "epochs=2")
"""Seconds on two ranks."""
LONG = ("workers=4", "epochs=20", "evaluation.every_epochs=5", "checkpoint.every_steps=5")
"""Long enough to be disturbed."""


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(Rig())
        except (OSError, RuntimeError) as error:
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield started


class Jobs:
    """Runs in a folder of their own, as jobs of the rig or as processes here."""

    def __init__(self, rig: Rig, digits: Path, runs: Path) -> None:
        self.rig = rig
        self.runs = runs
        self._common = (*RUN, f"data.root={digits}", f"runs_dir={runs}")
        python = Path(sys.executable).parent
        self.environment = rig.environment | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{python}{os.pathsep}{rig.environment['PATH']}",
        }

    def submit(self, *settings: str, ranks: int = 2, root: Path = ROOT) -> str:
        """Submit a run to both nodes with `ranks` ranks on each; return the job's number."""
        cluster = ("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=0")
        size = (f"cluster.ranks_per_node={ranks}", "cluster.cpus_per_task=1")
        (job,) = self.submit_all(*cluster, *size, *settings, root=root)
        return job

    def submit_all(self, *settings: str, root: Path = ROOT) -> list[str]:
        """The numbers of the jobs that scripts/submit.py says it has submitted."""
        script = str(root / "scripts" / "submit.py")
        lines = self.call(sys.executable, script, *self._common, *settings, root=root)
        return [line.split()[1].rstrip(",") for line in lines.splitlines() if "  job " in line]

    def sbatch(self, *settings: str, ranks: int = 2) -> str:
        """The same through slurm/train.sbatch."""
        self.runs.mkdir(exist_ok=True)  # for the log
        options = ("--nodes=2", f"--ntasks-per-node={ranks}", "--cpus-per-task=1")
        output = f"--output={self.runs}/%j.log"
        script = ("--parsable", *options, "--gpus-per-node=0", output, "slurm/train.sbatch")
        return self.call("sbatch", *script, *self._common, *settings).strip()

    def call(self, *command: str, root: Path = ROOT) -> str:
        environment = self.environment | {"PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False,
            timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> str:
        return self.call(sys.executable, str(ROOT / "scripts" / "status.py"), str(self.runs))

    def folder(self, *settings: str) -> Path:
        return run_folder(load_config([*self._common, *settings]))

    def log(self, folder: Path) -> str:
        """What a run's jobs have printed: those of submitit rank by rank, those of sbatch."""
        paths = [*sorted(folder.glob("slurm/*_log.out")), *sorted(self.runs.glob("*.log"))]
        return "\n".join(path.read_text() for path in paths)

    def here(self, *settings: str) -> Path:
        """The folder of the run, carried out by processes of this machine without Slurm."""
        script = str(ROOT / "scripts" / "train.py")
        self.call(sys.executable, script, *self._common, *settings)
        return self.folder(*settings)


@pytest.fixture
def jobs(rig: Rig, digits: Path, tmp_path: Path) -> Iterator[Jobs]:
    yield Jobs(rig, digits, tmp_path / "runs")
    rig.run("scancel", "--user=root", "--full")
    rig.wait_for_nodes()
    wait_until(lambda: not rig.run("squeue", "-h"), 30)


@pytest.fixture(scope="session")
def undisturbed(
    rig: Rig, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> "functools._lru_cache_wrapper[Path]":
    """Of settings, the folder of the run carried out without Slurm."""
    here = Jobs(rig, digits, tmp_path_factory.mktemp("undisturbed"))
    return functools.cache(here.here)


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def steps(folder: Path) -> list[int]:
    """The steps of the run's checkpoints."""
    names = (path.name for path in folder.glob("checkpoints/step_*"))
    return sorted(int(name.removeprefix("step_")) for name in names if name[5:].isdigit())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
