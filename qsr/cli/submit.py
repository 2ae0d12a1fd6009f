"""Submit runs to a Slurm cluster, one job per run.

    qsr submit experiment=vit_b16_b4096/quadratic_h4 seed=1,2,3 cluster=slurm \\
        cluster.nodes=2 cluster.gpus_per_node=8 cluster.partition=gpu
    qsr submit --dry-run ...        print the batch files, submit nothing

Takes the settings of `qsr train`. What your site needs belongs in a file, as docs/cluster.md shows:
~/.config/qsr/cluster/NAME.yaml, for use as cluster=NAME. With speed=NAME the plan shows hours. The
jobs run a copy of the current code. With cluster=local the runs are executed here, one after
another. Exit status: 0 submitted, 1 Slurm refused, 2 wrong settings.
"""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from qsr.cli.options import answer, read
from qsr.config.load import run_folder
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import ConfigError, showing_errors
from qsr.output import program, warn
from qsr.planner.forecast import forecast
from qsr.planner.text import plan_line


@showing_errors
def main(arguments: list[str]) -> int:
    line = read(arguments, {"--dry-run": False, "--in-job": False})
    options = set(line.own)
    status = answer(line, __doc__, {"--dry-run": "print the batch files, submit nothing"})
    if status is not None:
        return status
    try:
        configs = line.configs()
        kinds = {type(config.cluster) for config in configs}
        if "--in-job" in options:
            return _prepare_job(configs)
        if kinds == {SlurmCluster}:
            return _submit(configs, dry_run="--dry-run" in options)
        if SlurmCluster in kinds:
            raise ConfigError("these runs have different clusters: use one for all of them")
        return _run_here(configs, line.words, dry_run="--dry-run" in options)
    except OSError as error:
        warn(f"refused: {error}")
        return 2


def _submit(configs: list[Config], *, dry_run: bool) -> int:
    from qsr.errors import SlurmError
    from qsr.ops.jobs import check_submission  # imports torch, which is slow
    from qsr.run.identity import make_run_folder
    from qsr.run.snapshot import snapshot_folder

    try:
        from qsr.ops.submission import batch_script, submit
    except ImportError as error:  # an optional dependency
        raise ConfigError(
            f"{error}: pip install submitit, or, in a checkout, use sbatch slurm/train.sbatch"
        ) from None

    _refuse_equal(configs)
    folders = [check_submission(config) for config in configs]
    for config, folder in zip(configs, folders, strict=True):
        steps = _print_plan(config)
        if folder.summary_if_finished() is not None:
            print("  already finished")
        elif dry_run:
            print(batch_script(config, snapshot_folder(Path(config.runs_dir))))
        else:
            make_run_folder(folder)
            try:
                print(f"  job {submit(config, steps)}, logs in {folder.jobs}", flush=True)
            except SlurmError as error:
                warn(f"not submitted: {error}")
                return 1
    if not dry_run:
        print(f"qsr status {' '.join(sorted({c.runs_dir for c in configs}))}")
    return 0


def _run_here(configs: list[Config], words: list[str], *, dry_run: bool) -> int:
    from qsr.run.snapshot import snapshot_folder, take_snapshot

    for config in configs:
        _print_plan(config)
    runs_dir = Path(configs[0].runs_dir)
    code = snapshot_folder(runs_dir) if dry_run else take_snapshot(runs_dir)
    # -P: do not import from the caller's folder
    command = [sys.executable, "-P", "-m", "qsr", "train", *words]
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    if dry_run:
        print(f"PYTHONPATH={shlex.quote(path)} {shlex.join(command)}")
    else:
        sys.stdout.flush()
        os.execve(command[0], command, os.environ | {"PYTHONPATH": path})
    return 0


def _prepare_job(configs: list[Config]) -> int:
    """Called by slurm/train.sbatch when its job first starts: check the runs and copy the code. The
    link RUNS_DIR/.snapshots/job_CLUSTER_NUMBER points to the copy."""
    from qsr.cluster.slurm import own_job
    from qsr.ops.jobs import check_submission, write_job
    from qsr.run.identity import make_run_folder
    from qsr.run.snapshot import take_snapshot

    _refuse_equal(configs)
    if len({config.runs_dir for config in configs}) > 1:
        raise ConfigError("these runs have different runs_dir: all runs of a job must use the same")
    folders = [check_submission(config) for config in configs]
    runs_dir = Path(configs[0].runs_dir)
    code, title = take_snapshot(runs_dir), os.environ.get("SLURM_JOB_NAME", "")
    for config, folder in zip(configs, folders, strict=True):
        make_run_folder(folder)
        log = str(Path("/proc/self/fd/1").resolve())
        write_job(config, own_job(), title, code, _print_plan(config), log)
    cluster, number = os.environ.get("SLURM_CLUSTER_NAME", ""), os.environ["SLURM_JOB_ID"]
    link = runs_dir / ".snapshots" / f"job_{cluster}_{number}"
    link.unlink(missing_ok=True)  # from an earlier job: Slurm reuses job numbers
    link.symlink_to(code.name)
    return 0


def _refuse_equal(configs: list[Config]) -> None:
    if len({run_folder(config) for config in configs}) < len(configs):
        raise ConfigError("two of these runs are the same: list each value once")


def _print_plan(config: Config) -> int | None:
    """Print the run's folder and plan; return the number of steps, if it is known here."""
    from qsr.data import open_data
    from qsr.errors import DataError
    from qsr.train.models import count_parameters

    print(run_folder(config))
    data = config.data
    if data.train_images is None or data.classes is None:
        try:
            train, _ = open_data(data)
        except DataError as error:
            print(f"  no plan here: the nodes must see the data; {error}")
            return None
        data = replace(data, train_images=len(train), classes=len(train.classes))
    elif not Path(data.root).is_dir():
        print(f"  data.root={data.root} is not here: the nodes must see it, or set data.root=PATH")
    assert data.classes is not None
    parameters = count_parameters(config.model, data.classes, data.image_size)
    found = forecast(replace(config, data=data), parameters)
    print(f"  {plan_line(found)}")
    return found.plan.total_steps


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(main)
