"""What is said of a sweep before it is submitted, and how it becomes a job array."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsr.cli.options import read
from qsr.config.load import load_config, parse_config, run_folder, to_dict
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.ops.submission import array_script, submit_array
from qsr.ops.sweep import check_one_array, read_sweep, sweep_title
from qsr.run.folder import RunFolder, read_json
from qsr.run.identity import make_run_folder
from tests.cli import ENVIRONMENT, ROOT, RUN, program

DEMO = ("experiment=demo/quadratic", "cluster=slurm", "cluster.gpus_per_node=2")
PAPER = (
    *("experiment=vit_b16_b4096/quadratic_h4", "cluster=slurm", "cluster.nodes=2"),
    "data.root=/nodes/only",
)
"""Jobs of 16 GPUs."""


def asked(*settings: str) -> tuple[list[Config], list[dict[str, str]]]:
    line = read(settings)
    return line.configs(), line.swept()


def with_speed(config: Config) -> Config:
    """On a cluster as fast as the paper's."""
    speed = load_config(["experiment=demo/quadratic", "speed=paper_2x8"]).speed
    return replace(config, speed=speed)


def test_a_line_for_each_setting_and_the_totals() -> None:
    configs, swept = asked(*PAPER, "sync.alpha=0.01,0.0175", "seed=1,2,4")
    text = read_sweep([with_speed(config) for config in configs], swept).text()
    assert text.splitlines() == [
        "vit_b16_b4096/quadratic_h4 sync.alpha=0.01,0.0175 seed=1,2,4",
        "run  setting            seed   rounds  volume %  hours",
        "0-2  sync.alpha=0.01    1-2,4  14,372  15.4      20.56",
        "3-5  sync.alpha=0.0175  1-2,4  9,711   10.4      20.20",
        "data.root=/nodes/only is not here: the nodes must see it",
        "6 runs of 93,600 steps, up to 300.8 GB on disk; 122.3 hours in total (fitted, "
        "predicted), 1,956.5 GPU hours",
    ]
    configs, swept = asked(*PAPER, "sync.alpha=0.01,0.0175", "seed=1,2,4", "cluster.parallel=4")
    text = read_sweep([with_speed(config) for config in configs], swept).text()
    assert text.endswith("predicted), about 30.57 with 4 at once, 1,956.5 GPU hours")


def test_without_a_speed_and_without_the_data() -> None:
    configs, swept = asked(*DEMO, "seed=1,2", "sync.alpha=0.3,0.4375")
    title, _, first, second, totals = read_sweep(configs, swept).text().splitlines()
    assert title == "demo/quadratic seed=1,2 sync.alpha=0.3,0.4375"
    assert re.fullmatch(r"0,2  sync.alpha=0.3     1-2   50      15.2      -", first)
    assert re.fullmatch(r"1,3  sync.alpha=0.4375  1-2   38      11.5      -", second)
    assert totals.startswith("4 runs of 330 steps, up to 37.4 MB on disk; no hours: no speeds are ")
    configs, swept = asked(*DEMO, "seed=1,2", "data.train_images=null", "data.root=/nodes/only")
    sweep = read_sweep(configs, swept)
    assert sweep.steps == [None, None]
    *_, row, totals = sweep.text().splitlines()
    assert row.split() == [
        *("0-1", "demo/quadratic/data.train_images=null", "1-2", "-", "-", "-"),
    ]  # fmt: skip
    assert totals.startswith("2 runs; no plan here: the nodes must see the data; ")


def test_each_run_has_the_steps_of_its_setting() -> None:
    sweep = read_sweep(*asked(*DEMO, "seed=1,2", "schedule.warmup_epochs=1", "epochs=2,4"))
    assert sweep.steps == [44, 88, 44, 88]
    assert sweep.text().splitlines()[-1].startswith("4 runs, up to ")


def test_settings_beyond_a_limit_are_counted() -> None:
    sweep = read_sweep(*asked(*DEMO, "sync.alpha=0.1,0.2,0.3,0.4,0.5"))
    lines = sweep.text(most_settings=2).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["sync.alpha=0.1", "sync.alpha=0.2"]
    assert lines[4] == "... 3 more settings, in the order of their lists"
    assert len(lines) == 6


def test_a_title_that_would_be_long_has_no_values() -> None:
    values = ",".join(f"0.{number}" for number in range(100, 130))
    configs, swept = asked(*DEMO, f"sync.alpha={values}", "seed=1,2")
    assert sweep_title(configs, swept) == "demo/quadratic sync.alpha seed"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["workers=4,8", "cluster.nodes=1,2"], "different jobs (cluster.nodes): submit them sep"),
        (
            ["cluster.partition=a,b", "cluster.qos=c,d"],
            "jobs (cluster.partition, cluster.qos): sub",
        ),
    ],
)
def test_runs_that_are_no_array_are_refused(more: list[str], message: str) -> None:
    configs, _ = asked(*DEMO, *more)
    with pytest.raises(ConfigError) as refused:
        check_one_array(configs)
    assert message in str(refused.value)
    check_one_array(configs[:1])


def test_the_script_of_an_array(tmp_path: Path) -> None:
    configs, _ = asked(*DEMO, f"runs_dir={tmp_path}", "seed=1,2,3", "cluster.parallel=2")
    text = array_script(configs, "a title", tmp_path / "code")
    lines = text.splitlines()
    (folder,) = {match[1] for match in re.finditer(rf"({tmp_path}/\.arrays/[0-9a-f]{{16}})/", text)}
    assert {
        "#SBATCH --array=0-2%2", "#SBATCH --job-name='a title'", "#SBATCH --requeue",
        f"#SBATCH --output={folder}/%a/%A_%a_0_log.out",
    } <= set(lines)  # fmt: skip
    assert lines[-1].startswith(f"srun --unbuffered --output {folder}/%a/%A_%a_%t_log.out ")
    assert lines[-1].endswith(f"{sys.executable} -P -u -m qsr.ops.job_main {folder}/elements.jsonl")
    assert list(tmp_path.iterdir()) == []
    configs, _ = asked(*DEMO, f"runs_dir={tmp_path}", "seed=1,2,3")
    assert "#SBATCH --array=0-2" in array_script(configs, "a title", tmp_path).splitlines()


def test_what_a_submitted_array_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its elements' settings are on disk before sbatch is asked, and the same afterwards."""
    copy = f'cp "$(dirname "$2")/elements.jsonl" {tmp_path}/seen; echo "77;there"'
    program(tmp_path / "bin", "sbatch", copy)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    configs, _ = asked(*DEMO, f"runs_dir={tmp_path}/runs", "sync.alpha=0.3,0.5", "seed=1,2")
    for config in configs:
        make_run_folder(RunFolder(run_folder(config)))
    for _ in range(2):  # the same runs again have the same files
        assert submit_array(configs, "a title", [330, 330, None, 330]) == "77"
    (folder,) = (tmp_path / "runs" / ".arrays").iterdir()
    lines = (folder / "elements.jsonl").read_text().splitlines()
    assert (tmp_path / "seen").read_text().splitlines() == lines
    assert [parse_config(json.loads(line)) for line in lines] == configs
    for element, config in enumerate(configs):
        logs = run_folder(config) / "slurm"
        assert (folder / str(element)).resolve() == logs
        record = read_json(run_folder(config) / "job.json")
        assert (record["job"], record["title"]) == (f"77_{element}", "a title")
        assert record["steps"] == (None if element == 2 else 330)
        assert record["log"] == str(logs / f"77_{element}_0_log.out")


def test_an_element_carries_out_its_own_run(digits: Path, tmp_path: Path) -> None:
    configs = read([*RUN, f"data.root={digits}", f"runs_dir={tmp_path}", "cluster.ranks=1",
                    "stop_after_steps=1", "seed=1,2"]).configs()  # fmt: skip
    file = tmp_path / "elements.jsonl"
    file.write_text("".join(json.dumps(to_dict(config)) + "\n" for config in configs))
    done = element(file, "1")
    assert done.returncode == 0, done.stderr
    assert (run_folder(configs[1]) / "metrics.jsonl").exists()
    assert not run_folder(configs[0]).exists()
    for number in ("2", "-1", ""):
        refused = element(file, number)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"refused: {file} has no settings of element '{number}' (")
        assert refused.stderr.count("\n") == 1


def element(file: Path, number: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qsr.ops.job_main", str(file)],
        env=ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": number},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
