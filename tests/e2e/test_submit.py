"""scripts/submit.py as a user gives it, where there is no Slurm."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsr import build
from qsr.config.batch_script import check_batch_script
from qsr.config.load import load_config, load_configs, run_folder
from qsr.config.schema import SlurmCluster
from qsr.errors import ConfigError
from qsr.run.snapshot import running_code, snapshot_folder
from tests.cli import ROOT, RUN, call, call_here, folder_in, program

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
    done = call_here("submit", *arguments)
    return done.returncode, done.stdout, done.stderr


def settings(digits: Path, runs: Path) -> list[str]:
    return [*RUN, f"data.root={digits}", f"runs_dir={runs}"]


def test_a_dry_run_prints_all_of_a_site(digits: Path, tmp_path: Path) -> None:
    """The run's folder, its plan, and the file that sbatch would get."""
    runs = tmp_path / "my runs"
    run = [*settings(digits, runs), *SLURM, *SITE]
    status, output, errors = ask("--dry-run", *run)
    assert (status, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []  # nothing is made
    code, folder, lines = snapshot_folder(runs), run_folder(load_config(run)), output.splitlines()
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


SIXTEEN_GPUS = (
    *("experiment=vit_b16_b4096/quadratic_h4", "cluster=slurm", "cluster.nodes=2"),
    *("cluster.partition=gpu", "cluster.parallel=4", "data.root=/nodes/only"),
)
ALPHAS = [f"{0.01 + 0.002 * number:.3f}" for number in range(12)]


@pytest.mark.parametrize(
    ("sweep", "elements"),
    [
        (["sync.alpha=0.01,0.0175,0.025,0.03", "seed=1,2,3"], ["0-2", "3-5", "6-8", "9-11"]),
        # of more settings than fit, the first
        ([f"sync.alpha={','.join(ALPHAS)}"], [str(number) for number in range(8)]),
    ],
)
def test_the_dry_run_of_twelve_runs_fits_a_screen(
    sweep: list[str], elements: list[str], tmp_path: Path
) -> None:
    status, output, errors = ask("--dry-run", *SIXTEEN_GPUS, *sweep, f"runs_dir={tmp_path}")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert len(lines) <= 40
    assert [line.split()[0] for line in lines if "  sync.alpha=0.0" in line] == elements
    assert ("... 4 more settings, in the order of their lists" in lines) == (len(elements) == 8)
    assert "an array of 12 elements, the runs above, at most 4 at once" in lines
    assert lines.count("#!/bin/bash") == 1
    assert lines.count("#SBATCH --array=0-11%4") == 1
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("seeds", ["seed=1", "seed=1,2"])
def test_without_slurm_nothing_is_submitted(
    seeds: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, output, errors = ask(*settings(digits, tmp_path), *SLURM, seeds)
    assert status == 1
    assert "44 steps" in output
    assert errors.startswith("not submitted: sbatch")
    assert errors.count("\n") == 1
    assert list(tmp_path.rglob("job.json")) == []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which print files of this folder; what sbatch gets is in jobs/."""
    program(tmp_path, "scontrol", f"cat {tmp_path}/config")
    program(tmp_path, "squeue", f"cat {tmp_path}/queue")
    program(tmp_path, "sbatch", f"""
        mkdir -p {tmp_path}/jobs; number=$(ls {tmp_path}/jobs | wc -l); script="${{@: -1}}"
        if grep -q -- --array= "$script" && [ -e {tmp_path}/refusal ]; then
            cat {tmp_path}/refusal >&2; exit 1
        fi
        cp "$script" {tmp_path}/jobs/$number
        [ $# = 1 ] && echo "Submitted batch job $number" || echo "$number"
    """)  # fmt: skip
    (tmp_path / "config").write_text("MaxArraySize            = 1001\n")
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_finished_runs_are_no_elements(digits: Path, slurm: Path) -> None:
    run = [*settings(digits, slurm / "runs"), *SLURM, "sync.alpha=0.3,0.5"]
    configs = load_configs([*run, "seed=1,2"])
    for config in (configs[0], configs[3]):
        folder = run_folder(config)
        folder.mkdir(parents=True)
        done = {"steps": 44, "averages": 9, "volume": 0.2, "top1": 99.0, "planned": {}}
        (folder / "summary.json").write_text(json.dumps(done))
    status, output, errors = ask(*run, "seed=1,2")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0] == "2 of 4 runs already finished"
    assert [line.split()[:3] for line in lines[3:5]] == [
        ["0", "sync.alpha=0.3", "2"], ["1", "sync.alpha=0.5", "1"],
    ]  # fmt: skip
    assert lines[-2:] == [
        "job 0: an array of 2 elements, the runs above",
        f"qsr status {slurm / 'runs'}",
    ]
    assert "#SBATCH --array=0-1\n" in (slurm / "jobs" / "0").read_text()
    jobs = [run_folder(config) / "job.json" for config in configs]
    assert [json.loads(path.read_text())["job"] for path in jobs if path.exists()] == ["0_0", "0_1"]
    assert not jobs[0].exists()
    (slurm / "queue").write_text("0_1|RUNNING|0|None|demo/quadratic sync.alpha=0.3,0.5 seed=2,1|\n")
    status, output, errors = ask(*run, "seed=1,2")
    assert (status, output) == (2, "")
    assert errors == (
        f"refused: {run_folder(configs[2])} already has job 0_1 (RUNNING), which will run by "
        f"itself; to submit it again, run scancel 0_1 first\n"
    )
    (slurm / "queue").write_text("")
    status, output, _ = ask(*run, "seed=2")
    assert status == 0
    assert output.splitlines()[0] == "1 of 2 runs already finished"
    assert "--array" not in (slurm / "jobs" / "1").read_text()  # one run is left: a job of its own


@pytest.mark.parametrize("size", ["0", "1", None])
def test_where_slurm_has_no_arrays_each_run_is_a_job(
    size: str | None, digits: Path, slurm: Path
) -> None:
    """As it says itself, or as sbatch does."""
    (slurm / "config").write_text("" if size is None else f"MaxArraySize            = {size}\n")
    (slurm / "refusal").write_text(
        "sbatch: error: Batch job submission failed: Invalid job array specification"
    )
    run = [*settings(digits, slurm / "runs"), *SLURM, "seed=1,2", "cluster.parallel=1"]
    status, output, errors = ask(*run)
    assert (status, errors) == (0, "")
    folders = [run_folder(config) for config in load_configs(run)]
    assert output.splitlines()[-4:-1] == [
        "this Slurm has no job arrays: a job for each run, and cluster.parallel has no effect",
        f"  job 0: {folders[0]}",
        f"  job 1: {folders[1]}",
    ]
    for number, folder in enumerate(folders):
        assert json.loads((folder / "job.json").read_text())["job"] == str(number)
        assert (
            f"#SBATCH --job-name={folder.relative_to(slurm / 'runs')}\n"
            in (slurm / "jobs" / str(number)).read_text()
        )


def test_more_runs_than_an_array_may_have(digits: Path, slurm: Path) -> None:
    (slurm / "config").write_text("MaxArraySize            = 2\n")
    for dry_run in ([], ["--dry-run"]):
        status, _, errors = ask(*dry_run, *settings(digits, slurm / "runs"), *SLURM, "seed=1,2,3")
        assert status == 2
        assert errors == (
            "refused: 3 runs are more than a job array of this Slurm may have (MaxArraySize is 2): "
            "submit them in parts\n"
        )
    assert not (slurm / "runs").exists()


def test_another_refusal_of_sbatch_is_told(digits: Path, slurm: Path) -> None:
    (slurm / "refusal").write_text("sbatch: error: invalid partition specified: gpu")
    status, _, errors = ask(*settings(digits, slurm / "runs"), *SLURM, "seed=1,2")
    assert (status, errors) == (
        1, "not submitted: sbatch: error: invalid partition specified: gpu\n"
    )  # fmt: skip
    assert list(slurm.rglob("job.json")) == []


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
    assert (status, output) == (0, "1 of 1 runs already finished\n")


def test_another_run_in_the_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    run = [*settings(digits, tmp_path), "cluster.ranks=1"]
    build.run(load_config([*run, "stop_after_steps=2"]))
    config = folder_in(tmp_path) / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 0.4375", "alpha: 0.3"))
    status, _, errors = ask("--dry-run", *settings(digits, tmp_path), *SLURM)
    assert status == 2
    assert "holds a run with other settings (sync.alpha: 0.3 -> 0.4375): delete it" in errors
