"""Submits runs to Slurm: one as a job, through submitit, several as a job array.

A job runs a copy of the code taken at submission, so that edits do not affect jobs that wait or are
requeued. submitit writes a job's batch script, settings and logs to slurm/ in the run folder; its
own files there are pickles, which must be trusted as much as the code.

An array has a folder RUNS_DIR/.arrays/HASH, named by a hash of its runs' settings, which holds the
batch script, a line of elements.jsonl for each element, which is on disk before the array is
submitted and read whenever the element starts, and for each element a link to its run's slurm/, by
which Slurm finds where its logs belong.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from submitit import SlurmExecutor

from qsr.cluster.slurm import OWN_JOB, submit_script
from qsr.config.load import own_files, run_folder, to_dict
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import SlurmError
from qsr.ops.job_main import run_job
from qsr.ops.jobs import write_job
from qsr.run.durable import sync_folder
from qsr.run.folder import RunFolder, write_text
from qsr.run.snapshot import take_snapshot


class _Executor(SlurmExecutor):
    """submitit's executor, able to write a batch script without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def batch_script(self) -> str:
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text

    def array_script(self, module: str, file: Path, elements: int) -> str:
        """The script of an array of so many elements, whose ranks run a module with a file."""
        self.parameters["map_count"] = elements  # logs are named after the element
        command = f"{self.python} -u -m {module} {shlex.quote(str(file))}"
        text: str = self._make_submission_file_text(command, "")
        return text


def batch_script(config: Config, snapshot: Path) -> str:
    """The script that is passed to sbatch."""
    return _job(config, snapshot).batch_script()


def submit(config: Config, steps: int | None) -> str:
    """Submit the run and return the job number. `steps`: number of steps of its plan, if known.

    Raises OSError if the code cannot be copied, SlurmError if Slurm refuses.
    """
    snapshot = take_snapshot(Path(config.runs_dir), own_files([config]))
    try:
        with _as_from_outside():
            job = _job(config, snapshot).submit(run_job, to_dict(config))
    except (RuntimeError, FileNotFoundError) as error:
        raise SlurmError(" ".join(f"sbatch: {error}".split())) from None
    write_job(config, job.job_id, _title(config), snapshot, steps, str(job.paths.stdout))
    return str(job.job_id)


def array_script(configs: Sequence[Config], title: str, snapshot: Path) -> str:
    """The script of a job array of these runs, which have the same cluster and runs_dir; element i
    is the i-th run. `title`: the array's name."""
    cluster = configs[0].cluster
    assert isinstance(cluster, SlurmCluster)
    folder, throttle = _array_folder(configs), f"%{cluster.parallel}" if cluster.parallel else ""
    more = {"array": f"0-{len(configs) - 1}{throttle}"}
    executor = _executor(cluster, folder / "%a", title, snapshot, more)
    return executor.array_script("qsr.ops.job_main", folder / _ELEMENTS, len(configs))


def submit_array(configs: Sequence[Config], title: str, steps: Sequence[int | None]) -> str:
    """Submit the runs as a job array, as `array_script` describes it, and return its number.
    `steps`: of each run's plan, if known.

    Raises OSError if the code cannot be copied, SlurmError if Slurm refuses.
    """
    snapshot = take_snapshot(Path(configs[0].runs_dir), own_files(configs))
    folder = _array_folder(configs)
    folder.mkdir(parents=True, exist_ok=True)
    for element, config in enumerate(configs):
        logs, link = RunFolder(run_folder(config)).jobs, folder / str(element)
        logs.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():  # left by an earlier submission of the same runs
            link.symlink_to(os.path.relpath(logs, link.parent))
    write_text(folder / _ELEMENTS, _elements(configs))
    sync_folder(folder.parent)
    script = folder / "batch.sh"
    write_text(script, array_script(configs, title, snapshot))
    with _as_from_outside():
        array = submit_script(script)
    for element, (config, its_steps) in enumerate(zip(configs, steps, strict=True)):
        job = f"{array}_{element}"
        log = (RunFolder(run_folder(config)).jobs / f"{job}_0_log.out").absolute()
        write_job(config, job, title, snapshot, its_steps, str(log))
    return array


_ELEMENTS = "elements.jsonl"


def _elements(configs: Sequence[Config]) -> str:
    return "".join(json.dumps(to_dict(config)) + "\n" for config in configs)


def _array_folder(configs: Sequence[Config]) -> Path:
    digest = hashlib.sha256(_elements(configs).encode()).hexdigest()[:16]
    return (Path(configs[0].runs_dir) / ".arrays" / digest).absolute()


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


def _job(config: Config, snapshot: Path) -> _Executor:
    cluster = config.cluster
    assert isinstance(cluster, SlurmCluster)
    return _executor(cluster, RunFolder(run_folder(config)).jobs, _title(config), snapshot, {})


def _executor(
    cluster: SlurmCluster, folder: Path, title: str, snapshot: Path, more: dict[str, str]
) -> _Executor:
    """`folder`: of submitit's files; `more`: options of sbatch."""
    python = cluster.python or shlex.quote(sys.executable)
    words = [cluster.container, python, "-P"]  # -P: do not import from the job's working directory
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
        job_name=title,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        time=cluster.time_limit_minutes,
        stderr_to_stdout=True,
        wckey=None,
        setup=[*cluster.setup, *_exports(cluster, snapshot)],
        srun_args=_srun_arguments(cluster),
        additional_parameters=_more_options(cluster) | more,
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
