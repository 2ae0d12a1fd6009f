"""Submits a Config as a Slurm job, through submitit.

A job runs a copy of the code taken at submission, so that edits do not affect jobs that wait or are
requeued. submitit writes the batch script, the settings and the logs to slurm/ in the run folder.
Its own files there are pickles, which must be trusted as much as the code.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submitit import SlurmExecutor

from qsr.cluster.slurm import OWN_JOB
from qsr.config.load import own_files, run_folder, to_dict
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import SlurmError
from qsr.ops.job_main import run_job
from qsr.ops.jobs import write_job
from qsr.run.folder import RunFolder
from qsr.run.snapshot import take_snapshot


class _Executor(SlurmExecutor):
    """submitit's executor, able to write a batch script without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def batch_script(self) -> str:
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def batch_script(config: Config, snapshot: Path) -> str:
    """The script that is passed to sbatch."""
    return _executor(config, snapshot).batch_script()


def submit(config: Config, steps: int | None) -> str:
    """Submit the run and return the job number. `steps`: number of steps of its plan, if known.

    Raises OSError if the code cannot be copied, SlurmError if Slurm refuses.
    """
    snapshot = take_snapshot(Path(config.runs_dir), own_files([config]))
    try:
        with _as_from_outside():
            job = _executor(config, snapshot).submit(run_job, to_dict(config))
    except (RuntimeError, FileNotFoundError) as error:
        raise SlurmError(" ".join(f"sbatch: {error}".split())) from None
    write_job(config, job.job_id, _title(config), snapshot, steps, str(job.paths.stdout))
    return str(job.job_id)


def _title(config: Config) -> str:
    """The job's name."""
    return f"{config.experiment}/seed_{config.seed}"


@contextmanager
def _as_from_outside() -> Iterator[None]:
    """Hide the variables of the job that this process may be in. (submitit's clean_env would also
    hide SLURM_CONF and SBATCH_ACCOUNT.)"""
    names = [name for name in os.environ if name.startswith("SLURM") and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= hidden


def _executor(config: Config, snapshot: Path) -> _Executor:
    cluster = config.cluster
    assert isinstance(cluster, SlurmCluster)
    python = cluster.python or shlex.quote(sys.executable)
    words = [cluster.container, python, "-P"]  # -P: do not import from the job's working directory
    folder = RunFolder(run_folder(config)).jobs
    executor = _Executor(folder, python=" ".join(word for word in words if word))
    optional = {
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": None if cluster.memory_gb is None else f"{cluster.memory_gb}G",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    executor.update_parameters(
        job_name=_title(config),
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        time=cluster.time_limit_minutes,
        stderr_to_stdout=True,
        wckey=None,
        setup=[*cluster.setup, *_exports(cluster, snapshot)],
        srun_args=_srun_arguments(cluster),
        additional_parameters=_more_options(cluster),
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def _exports(cluster: SlurmCluster, snapshot: Path) -> list[str]:
    values = dict(cluster.environment)
    if cluster.network_interface is not None:
        interface = cluster.network_interface
        values |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in values.items()]
    if cluster.requeue:
        lines.append(f"export {OWN_JOB}=$SLURM_JOB_ID")
    return [*lines, f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def _srun_arguments(cluster: SlurmCluster) -> list[str]:
    own = ["--kill-on-bad-exit=1"]
    if cluster.cpus_per_task is not None:  # since 22.05 srun does not inherit it from sbatch
        own.append(f"--cpus-per-task={cluster.cpus_per_task}")
    return [*own, *cluster.srun_arguments]


def _more_options(cluster: SlurmCluster) -> dict[str, str | int | bool]:
    signal = f"{cluster.signal.removeprefix('SIG')}@{cluster.signal_lead_seconds}"
    own: dict[str, str | int | bool] = {"signal": signal}
    own["requeue" if cluster.requeue else "no-requeue"] = True
    if cluster.reservation is not None:
        own["reservation"] = cluster.reservation
    return own | {name: value for name, value in cluster.sbatch.items() if value is not False}
