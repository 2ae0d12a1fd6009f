"""scripts/submit.py as a user gives it, where there is no Slurm."""

import contextlib
import importlib.util
import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsr import build
from qsr.config.batch_script import check_batch_script
from qsr.config.load import load_config, run_folder
from qsr.config.schema import SlurmCluster
from qsr.errors import ConfigError
from qsr.run.snapshot import running_code, snapshot_folder
from tests.cli import ROOT, RUN, call, folder_in

SUBMIT = [sys.executable, str(ROOT / "scripts" / "submit.py")]
SLURM = ("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=0", "cluster.ranks_per_node=1")
SITE = (
    "cluster.cpus_per_task=4", "cluster.memory_gb=64", "cluster.time_limit_minutes=90",
    "cluster.partition=gpu", "cluster.account=lab", "cluster.qos=long", "cluster.constraint=h100",
    "cluster.reservation=course", "cluster.sbatch={exclusive: true, mail-type: END, nice: false}",
    "cluster.signal=SIGUSR1", "cluster.signal_lead_seconds=120",
    'cluster.setup=["module load cuda/13.0", "source ~/env/bin/activate"]',
    'cluster.container="apptainer exec --nv image.sif"', "cluster.python=python3",
    'cluster.srun_arguments=["--cpu-bind=cores"]', "cluster.network_interface=ib0",
    '+cluster.environment.NCCL_IB_HCA="mlx5_0,mlx5_1"',
)  # fmt: skip


def ask(*arguments: str) -> tuple[int, str, str]:
    """The script's exit status, output and errors, in this process."""
    specification = importlib.util.spec_from_file_location("submit_script", SUBMIT[1])
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = script.main(list(arguments))
    return status, output.getvalue(), errors.getvalue()


def settings(digits: Path, runs: Path) -> list[str]:
    return [*RUN, f"data.root={digits}", f"runs_dir={runs}"]


def test_a_dry_run_prints_all_of_a_site(digits: Path, tmp_path: Path) -> None:
    """For each seed: its folder, its plan, and the file that sbatch would get."""
    runs = tmp_path / "my runs"
    run = [*settings(digits, runs), *SLURM, *SITE]
    status, output, errors = ask("--dry-run", *run, "seed=1,2")
    assert (status, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []  # nothing is made
    code = snapshot_folder(runs)
    first, second = (run_folder(load_config([*run, f"seed={seed}"])) for seed in (1, 2))
    middle = output.index(f"{second}\n  44 steps")
    for folder, text in ((first, output[:middle]), (second, output[middle:])):
        lines = text.splitlines()
        assert lines[0] == str(folder)
        assert lines[1].startswith("  44 steps in 2 epochs, 9 rounds (volume 20.5 %)")
        assert lines[2] == "#!/bin/bash"
        options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
        assert options == {
            "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--mem=64G", "--time=90",
            "--partition=gpu", "--account=lab", "--qos=long", "--constraint=h100",
            "--reservation=course", "--exclusive", "--mail-type=END", "--signal=USR1@120",
            "--requeue", "--open-mode=append", f"--job-name={folder.relative_to(runs)}",
            f"--output='{folder}/slurm/%j_0_log.out'",
        }  # fmt: skip
        setup = lines[lines.index("# setup") + 1 : lines.index("# command") - 1]
        assert setup == [
            "module load cuda/13.0",
            "source ~/env/bin/activate",
            "export NCCL_DEBUG=WARN",
            "export PYTHONFAULTHANDLER=1",
            "export TORCH_CPP_LOG_LEVEL=ERROR",
            "export NCCL_IB_HCA=mlx5_0,mlx5_1",
            "export NCCL_SOCKET_IFNAME=ib0",
            "export GLOO_SOCKET_IFNAME=ib0",
            "export QSR_JOB=$SLURM_JOB_ID",
            f"export PYTHONPATH='{code}'${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
        (srun,) = (shlex.split(line) for line in lines if line.startswith("srun"))
        assert srun == [
            *("srun", "--unbuffered", "--output", f"{folder}/slurm/%j_%t_log.out"),
            *("--kill-on-bad-exit=1", "--cpus-per-task=4", "--cpu-bind=cores"),
            *("apptainer", "exec", "--nv", "image.sif", "python3", "-P", "-u", "-m"),
            *("submitit.core._submit", f"{folder}/slurm"),
        ]


def test_what_a_site_leaves_out(digits: Path, tmp_path: Path) -> None:
    run = [*settings(digits, tmp_path), *SLURM, "cluster.cpus_per_task=null"]
    status, output, _ = ask("--dry-run", *run, "cluster.requeue=false", "cluster.environment={}")
    assert status == 0
    lines = output.splitlines()
    assert "#SBATCH --no-requeue" in lines
    assert "#SBATCH --signal=USR2@300" in lines
    assert "#SBATCH --time=1440" in lines
    absent = (
        *("--requeue", "--mem", "--gpus", "--cpus", "--partition", "--account", "SOCKET_IFNAME"),
        "QSR_JOB",  # without it nothing requeues the job
    )
    assert [word for word in absent if word in output] == []
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert f" --kill-on-bad-exit=1 {sys.executable} -P -u -m " in srun


def test_gpus_are_asked_for(digits: Path, tmp_path: Path) -> None:
    run = [*settings(digits, tmp_path), "cluster=slurm", "cluster.gpus_per_node=2"]
    lines = ask("--dry-run", *run)[1].splitlines()
    assert {"#SBATCH --gpus-per-node=2", "#SBATCH --ntasks-per-node=2"} <= set(lines)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cluster.nodes=3"], "cluster.nodes=3 x 1 ranks per node = 3 ranks do not divide"),
        (["cluster.partion=gpu"], "cluster.partion is not a setting of cluster.launcher=slurm; did "
         "you mean cluster.partition?"),
        (["cluster.sbatch={time: 5}"], "cluster.sbatch.time: set cluster.time_limit_minutes"),
        (["cluster.partition='x\ntouch RAN #'"], "cluster.partition contains a line break"),
        (["cluster.sbatch={comment: 'x\rtouch RAN'}"], "cluster.sbatch contains a line break"),
        (["cluster.setup=['module load a\ntouch RAN']"], "cluster.setup contains a line break"),
        (["++cluster.environment={KEY: 'x\ny'}"], "cluster.environment contains a line break"),
        (["++cluster.environment={KEY: [secret]}"], "cluster.environment.KEY.str: input should be"),
        (["runs_dir='x\ntouch RAN #'"], "runs_dir contains a line break"),
        (["runs_dir='100%j'"], "100%j/demo/quadratic/"),
        (["cluster.container='run \"a'"], "cluster.container has an unclosed quote (No closing"),
        (["seed=1,1"], "two of these runs are the same: list each value once"),
        (["--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (["model=small_vit", "data.image_size=30"], "data.image_size=30 is not a multiple"),
        (["sync.alpha=fast"], "sync.alpha='fast': input should be a valid number"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(
    more: list[str], message: str, digits: Path, tmp_path: Path
) -> None:
    for dry_run in ([], ["--dry-run"]):
        status, output, errors = ask(*dry_run, *settings(digits, tmp_path), *SLURM, *more)
        assert (status, output) == (2, "")
        assert errors.startswith(f"refused: {message}")
        assert errors.count("\n") == 1
        assert "secret" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_line_break_in_the_name_of_the_run_is_none_in_its_script(
    digits: Path, tmp_path: Path
) -> None:
    run = [*settings(digits, tmp_path), *SLURM, "data.name='x\ntouch RAN #'"]
    status, output, _ = ask("--dry-run", *run)
    assert status == 0
    assert '/demo/quadratic/data.name="x_touch RAN #"' in output
    assert not [line for line in output.splitlines() if line.lstrip().startswith("touch")]


@pytest.mark.parametrize("option", ["comment=x --wrap", "x\ty", "-x", "", "\u0661"])
def test_what_is_no_option_of_sbatch_is_refused(option: str, tmp_path: Path) -> None:
    """As a file of configs/cluster may name one."""
    cluster = load_config([*RUN, *SLURM]).cluster
    assert isinstance(cluster, SlurmCluster)
    with pytest.raises(ConfigError, match="is not the long name of an sbatch option"):
        check_batch_script(replace(cluster, sbatch={option: True}), "custom", tmp_path)


def test_data_that_only_the_nodes_see(tmp_path: Path) -> None:
    run = [*RUN, "data.root=/nodes/only", f"runs_dir={tmp_path}", *SLURM]
    status, output, _ = ask("--dry-run", *run)
    assert status == 0
    text = "data.root=/nodes/only is not here: the nodes must see it, or set data.root=PATH"
    assert f"\n  {text}\n  44 steps in" in output
    status, output, _ = ask("--dry-run", *run, "data.train_images=null")
    assert status == 0
    assert (
        "  no plan here: the nodes must see the data; no folder /nodes/only: set data.root=PATH"
        in output
    )


def test_without_slurm_nothing_is_submitted(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, output, errors = ask(*settings(digits, tmp_path), *SLURM)
    assert status == 1
    assert "  44 steps in 2 epochs" in output
    assert errors.startswith("not submitted: sbatch: ")
    assert errors.count("\n") == 1
    assert list(tmp_path.rglob("job.json")) == []


def test_with_cluster_local_the_run_is_carried_out_here_from_a_copy(
    digits: Path, tmp_path: Path
) -> None:
    run = [*settings(digits, tmp_path), "cluster.ranks=1"]
    code = snapshot_folder(tmp_path)
    status, dry, _ = ask("--dry-run", *run)
    words = shlex.split(dry.splitlines()[-1])
    assert status == 0
    assert words[0].startswith(f"PYTHONPATH={code}")
    assert words[1:7] == [sys.executable, "-P", "-m", "qsr", "train", RUN[0]]
    assert list(tmp_path.iterdir()) == []
    done = call([*SUBMIT, *run])
    assert done.returncode == 0, done.stderr
    folder = run_folder(load_config(run))
    assert done.stdout.splitlines()[0] == str(folder)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 44
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["code"] == running_code()
    assert environment["git"] == json.loads((code / "revision.json").read_text())
    status, output, _ = ask(*settings(digits, tmp_path), *SLURM)  # there is nothing left to submit
    assert (status, "  already finished" in output) == (0, True)


def test_another_run_in_the_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    run = [*settings(digits, tmp_path), "cluster.ranks=1"]
    build.run(load_config([*run, "stop_after_steps=2"]))
    config = folder_in(tmp_path) / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 0.4375", "alpha: 0.3"))
    status, _, errors = ask("--dry-run", *settings(digits, tmp_path), *SLURM)
    assert status == 2
    assert "holds a run with other settings (sync.alpha: 0.3 -> 0.4375): delete it" in errors
