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

import psutil
import pytest

from qsr.config.load import CONFIG_DIR, load_config, load_configs, run_folder
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
        self.common = (*RUN, f"data.root={digits}", f"runs_dir={runs}")
        python = Path(sys.executable).parent
        self.environment = rig.environment | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{python}{os.pathsep}{rig.environment['PATH']}",
        }

    def submit(self, *settings: str, ranks: int = 2, root: Path = ROOT) -> str:
        """Submit a run to both nodes with `ranks` ranks on each; return the job's number."""
        cluster = ("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=0")
        size = (f"cluster.ranks_per_node={ranks}", "cluster.cpus_per_task=1")
        command = (sys.executable, str(root / "scripts" / "submit.py"), *self.common)
        lines = self.call(*command, *cluster, *size, *settings, root=root).splitlines()
        (job,) = (line.split()[1].rstrip(",") for line in lines if line.startswith("  job "))
        return job

    def submit_array(self, *settings: str, ranks: int = 1) -> str:
        """Submit runs of so many ranks on one node as a job array; return its number."""
        lines = self.qsr("submit", *self.common, *one_node(ranks), *settings).splitlines()
        (array,) = (line.split()[1].rstrip(":") for line in lines if line.startswith("job "))
        return array

    def sbatch(self, *settings: str, ranks: int = 2) -> str:
        """The same through slurm/train.sbatch."""
        self.runs.mkdir(exist_ok=True)  # for the log
        options = ("--nodes=2", f"--ntasks-per-node={ranks}", "--cpus-per-task=1")
        output = f"--output={self.runs}/%j.log"
        script = ("--parsable", *options, "--gpus-per-node=0", output, "slurm/train.sbatch")
        return self.call("sbatch", *script, *self.common, *settings).strip()

    def call(self, *command: str, root: Path = ROOT) -> str:
        done = self.try_to(*command, root=root)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_to(self, *command: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command's exit status and output."""
        environment = self.environment | {"PYTHONPATH": str(root)}
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False,
            timeout=240,
        )  # fmt: skip

    def qsr(self, name: str, *arguments: str) -> str:
        """What scripts/NAME.py prints."""
        return self.call(sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments)

    def status(self) -> str:
        return self.qsr("status", str(self.runs))

    def folder(self, *settings: str) -> Path:
        return run_folder(load_config([*self.common, *settings]))

    def folders(self, *settings: str) -> list[Path]:
        """Of a sweep."""
        return [run_folder(config) for config in load_configs([*self.common, *settings])]

    def log(self, folder: Path) -> str:
        """What a run's jobs have printed: those of submitit rank by rank, those of sbatch."""
        paths = [*sorted(folder.glob("slurm/*_log.out")), *sorted(self.runs.glob("*.log"))]
        return "\n".join(path.read_text() for path in paths)

    def here(self, *settings: str) -> Path:
        """The folder of the run, carried out by processes of this machine without Slurm."""
        return self.all_here(*settings)[0]

    def all_here(self, *settings: str) -> list[Path]:
        """The same of a sweep."""
        self.qsr("train", *self.common, *settings)
        return self.folders(*settings)


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


def ranks(rig: Rig, job: str) -> list[int]:
    """The processes of a job's ranks, in their order."""
    found = {}
    for pid in rig.processes(job):
        environment = dict(
            entry.split(b"=", 1)
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"=" in entry
        )
        name = psutil.Process(pid).name()
        if b"SLURM_STEP_ID" in environment and name.startswith("python"):
            found[int(environment[b"SLURM_PROCID"])] = pid
    return [found[rank] for rank in sorted(found)]


def one_node(ranks: int = 1) -> tuple[str, ...]:
    """Settings of a job with so many ranks."""
    size = ("cluster.nodes=1", "cluster.gpus_per_node=0", f"cluster.ranks_per_node={ranks}")
    return ("cluster=slurm", *size, "cluster.cpus_per_task=1")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def steps(folder: Path) -> list[int]:
    """The steps of the run's checkpoints."""
    names = (path.name for path in folder.glob("checkpoints/step_*"))
    return sorted(int(name.removeprefix("step_")) for name in names if name[5:].isdigit())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
