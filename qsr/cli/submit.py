"""Submit runs to a Slurm cluster: one as a job, several as a job array.

    qsr submit experiment=vit_b16_b4096/quadratic_h4 seed=1,2,3 cluster=slurm \\
        cluster.nodes=2 cluster.gpus_per_node=8 cluster.partition=gpu data.root=PATH
    qsr submit ... sync.alpha=0.01,0.0175 seed=1,2,3 cluster.parallel=4     at most 4 runs at once
    qsr submit --dry-run ...        print the plan and the batch file, submit nothing

Takes the settings of `qsr train`. What your site needs belongs in a file, as docs/cluster.md shows:
~/.config/qsr/cluster/NAME.yaml, for use as cluster=NAME. With speed=NAME the plan shows hours.
Finished runs are left out. The jobs run a copy of the current code. With cluster=local the runs are
executed here, one after another. Exit status: 0 submitted, 1 Slurm refused, 2 wrong settings.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qsr.cli.options import answer, read
from qsr.cli.usage import OWN_OPTIONS
from qsr.cluster.slurm import most_elements, own_job
from qsr.config.load import own_files, run_folder
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import ConfigError, SlurmError, showing_errors
from qsr.output import in_words_of_caller, program, warn
from qsr.planner.text import plan_line
from qsr.run.folder import RunFolder

if TYPE_CHECKING:
    from qsr.ops.sweep import Sweep  # imports torch, which is slow


@showing_errors
def main(arguments: list[str]) -> int:
    line = read(arguments, {"--dry-run": False, "--in-job": False})
    options = set(line.own)
    status = answer(line, __doc__, OWN_OPTIONS["submit"])
    if status is not None:
        return status
    try:
        configs = line.configs()
        kinds = {type(config.cluster) for config in configs}
        if "--in-job" in options:
            return _prepare_job(configs)
        if kinds == {SlurmCluster}:
            return _submit(configs, line.swept(), dry_run="--dry-run" in options)
        if SlurmCluster in kinds:
            raise ConfigError("these runs have different clusters: use one for all of them")
        return _run_here(configs, line.words, dry_run="--dry-run" in options)
    except OSError as error:
        warn(f"refused: {error}")
        return 2


def _submit(configs: list[Config], swept: list[dict[str, str]], *, dry_run: bool) -> int:
    from qsr.ops.jobs import check_submissions  # imports torch, which is slow
    from qsr.ops.sweep import check_one_array, read_sweep

    try:
        import qsr.ops.submission  # noqa: F401
    except ImportError as error:  # an optional dependency
        raise ConfigError(
            f"{error}: pip install submitit, or, in a checkout, use sbatch slurm/train.sbatch"
        ) from None

    _refuse_equal(configs)
    check_one_array(configs)
    folders = check_submissions(configs)
    left = [n for n, folder in enumerate(folders) if folder.summary_if_finished() is None]
    if len(left) < len(configs):
        print(f"{len(configs) - len(left)} of {len(configs)} runs already finished")
    configs, swept = [configs[n] for n in left], [swept[n] for n in left]
    try:
        if len(configs) > 1:
            _submit_sweep(configs, read_sweep(configs, swept), dry_run=dry_run)
        elif configs:
            _submit_run(configs[0], dry_run=dry_run)
    except SlurmError as error:
        warn(f"not submitted: {error}")
        return 1
    if configs and not dry_run:
        print(in_words_of_caller(f"qsr status {configs[0].runs_dir}"))
    return 0


def _submit_run(config: Config, *, dry_run: bool) -> None:
    from qsr.ops.submission import batch_script, submit
    from qsr.run.identity import make_run_folder
    from qsr.run.snapshot import snapshot_folder

    steps = _print_plan(config)
    if dry_run:
        code = snapshot_folder(Path(config.runs_dir), own_files([config]))
        print(batch_script(config, code))
        return
    folder = RunFolder(run_folder(config))
    make_run_folder(folder)
    print(f"  job {submit(config, steps)}, logs in {folder.jobs}", flush=True)


_SCREEN_LINES = 40
"""Of a dry run, if the batch script is not too long for them."""
_FEWEST_SETTINGS = 4
"""Lines for settings in a dry run, however long the batch script."""


def _submit_sweep(configs: list[Config], sweep: "Sweep", *, dry_run: bool) -> None:
    from qsr.ops.submission import array_script, batch_script, submit, submit_array
    from qsr.run.identity import make_run_folder
    from qsr.run.snapshot import snapshot_folder

    cluster, arrays = configs[0].cluster, _has_arrays(len(configs))
    assert isinstance(cluster, SlurmCluster)
    throttle = f", at most {cluster.parallel} at once" if cluster.parallel else ""
    about = f"an array of {len(configs)} elements, the runs above{throttle}"
    none = "this Slurm has no job arrays: a job for each run" + (
        ", and cluster.parallel has no effect" if throttle else ""
    )
    if dry_run:
        code = snapshot_folder(Path(configs[0].runs_dir), own_files(configs))
        script = (
            array_script(configs, sweep.title, code) if arrays else batch_script(configs[0], code)
        )
        lines = [about if arrays else f"{none}, the first of which:", *script.splitlines()]
        room = _SCREEN_LINES - len(lines) - len(sweep.text(most_settings=0).splitlines())
        print("\n".join([sweep.text(max(room, _FEWEST_SETTINGS)), *lines]))
        return
    print(sweep.text(), flush=True)
    for config in configs:
        make_run_folder(RunFolder(run_folder(config)))
    if arrays:
        try:
            print(f"job {submit_array(configs, sweep.title, sweep.steps)}: {about}")
            return
        except SlurmError as error:
            if "job array" not in str(error):
                raise
    print(none)
    for config, steps in zip(configs, sweep.steps, strict=True):
        print(f"  job {submit(config, steps)}: {run_folder(config)}", flush=True)


def _has_arrays(runs: int) -> bool:
    """Whether this Slurm has job arrays, as far as it says so. Raises ConfigError if it has none
    for so many runs."""
    most = most_elements()
    if most is not None and 1 < most < runs:
        raise ConfigError(
            f"{runs:,} runs are more than a job array of this Slurm may have (MaxArraySize is "
            f"{most:,}): submit them in parts"
        )
    return most is None or most > 1


def _run_here(configs: list[Config], words: list[str], *, dry_run: bool) -> int:
    from qsr.run.snapshot import snapshot_folder, take_snapshot

    for config in configs:
        _print_plan(config)
    copy_code = snapshot_folder if dry_run else take_snapshot
    code = copy_code(Path(configs[0].runs_dir), own_files(configs))
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
    from qsr.ops.jobs import check_submissions, write_job
    from qsr.run.identity import make_run_folder
    from qsr.run.snapshot import take_snapshot

    _refuse_equal(configs)
    if len({config.runs_dir for config in configs}) > 1:
        raise ConfigError("these runs have different runs_dir: all runs of a job must use the same")
    folders = check_submissions(configs)
    runs_dir = Path(configs[0].runs_dir)
    code = take_snapshot(runs_dir, own_files(configs))
    title = os.environ.get("SLURM_JOB_NAME", "")
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
    from qsr.errors import DataError, UnknownPlanError
    from qsr.ops.sweep import forecast_here

    print(run_folder(config))
    try:
        found = forecast_here(config)
    except UnknownPlanError as error:
        print(f"  {error}")
        return None
    except DataError as error:
        print(f"  no plan here: the nodes must see the data; {error}")
        return None
    if not Path(config.data.root).is_dir():
        root = config.data.root
        print(f"  data.root={root} is not here: the nodes must see it, or set data.root=PATH")
    print(f"  {plan_line(found)}")
    return found.plan.total_steps


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(main)
