"""F29: run folders are damaged, forged, or hold secrets. One damaged folder does not hide the
others. Only what a run really achieved becomes a record, in its own place, without anything private
to the site."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr.config.load import settings_hash
from qsr.errors import ReportError
from qsr.ops.status import read_status
from qsr.ops.status_table import status_table
from qsr.report.collect import find_runs, read_run
from qsr.report.records import add_record, read_summaries
from tests.cli import ENVIRONMENT, ROOT, call

Change = Callable[[Path], object]


@pytest.fixture
def folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's, without its checkpoints, in tmp_path/runs."""
    ignore = shutil.ignore_patterns("checkpoints", "*.safetensors")
    return Path(shutil.copytree(uninterrupted, tmp_path / "runs" / "seed_3", ignore=ignore))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def as_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def bomb(path: Path) -> None:
    """A few lines that stand for 10^9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9)]
    path.write_text("\n".join(lines) + "\n" + path.read_text())


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ROW = {"kind": "train", "step": 1, "epoch": 0.1, "h": 4, "train_seconds": 1.0}
DAMAGES: dict[str, tuple[str, Change]] = {
    "a row that is a number": ("metrics.jsonl", lambda path: append(path, "5")),
    "a row without a kind": ("metrics.jsonl", lambda path: append(path, '{"step": 1}')),
    "a row without an epoch": (
        "metrics.jsonl",
        lambda path: append(path, '{"kind": "eval", "step": 50, "top1": 1, "seconds": 1}'),
    ),
    "binary rows": ("metrics.jsonl", lambda path: path.write_bytes(bytes(range(256)) * 9)),
    "a row at step 0": ("metrics.jsonl", lambda path: append(path, json.dumps(ROW | {"step": 0}))),
    "infinite time": (
        "metrics.jsonl",
        lambda path: append(path, json.dumps(ROW | {"train_seconds": float("inf")})),
    ),
    "a number of 500 digits": (
        "metrics.jsonl",
        lambda path: append(path, json.dumps(ROW | {"h": 10**500})),
    ),
    "brackets, 100,000": ("metrics.jsonl", lambda path: append(path, "[" * 100_000)),
    "metrics are a folder": ("metrics.jsonl", as_a_folder),
    "no failure": ("failure.json", lambda path: path.write_text("{}")),
    "a list of failures": ("failure.json", lambda path: path.write_text("[]")),
    "a job without a number": ("job.json", lambda path: path.write_text("{}")),
    "a job that is a word": (
        "job.json",
        lambda path: path.write_text('{"job": "17,x", "log": "/log"}'),
    ),
    "a pipe": ("data.json", pipe),
    "deep yaml": ("config.yaml", lambda path: path.write_text("[" * 3000)),
    "yaml aliases": ("config.yaml", bomb),
    "settings that are none": ("config.yaml", lambda path: path.write_text("data: [1]")),
    "no text": ("config.yaml", lambda path: path.write_bytes(bytes(range(256)))),
    "a huge file": ("data.json", lambda path: path.write_bytes(b" " * 2**21)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_says_so_and_hides_no_other(folder: Path, damage: str) -> None:
    damaged = Path(shutil.copytree(folder, folder.parent / "seed_4"))
    (damaged / "summary.json").unlink()
    name, do = DAMAGES[damage]
    do(damaged / name)
    found = find_runs([folder.parent])
    good, bad = (read_status(path, {}) for path in found)
    assert (good.state, good.detail) == ("done", "")
    assert bad.state == "stopped"
    assert f"{damaged}/{name}" in bad.detail
    assert len(status_table([good, bad]).splitlines()) == 3


AS_ANOTHER_USER = """
import sys
from pathlib import Path
from qsr.ops.status import read_status
from qsr.ops.status_table import status_table
from qsr.report.collect import find_runs
from tests.faults.inject import give_up_privileges_here
give_up_privileges_here()
print(status_table([read_status(folder, {}) for folder in find_runs([Path(sys.argv[1])])]))
"""


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_folder_that_is_closed_to_this_user_hides_no_other(folder: Path, mode: int) -> None:
    closed = Path(shutil.copytree(folder, folder.parent / "seed_4"))
    (closed / "summary.json").chmod(0o000)
    closed.chmod(mode)
    seen = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, str(folder.parent)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    closed.chmod(0o700)
    assert (seen.returncode, seen.stderr) == (0, "")
    assert str(folder) in seen.stdout
    assert "done  " in seen.stdout
    assert (str(closed) in seen.stdout) == (mode == 0o100)  # its files can be opened by their names


def test_odd_names_beside_the_checkpoints_are_none(folder: Path) -> None:
    (folder / "summary.json").unlink()
    for name in ("step_²", "step_", "step_-7", "step_000000099.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert read_status(folder, {}).step == 44


def test_a_run_is_recorded_and_its_summary_read(folder: Path, tmp_path: Path) -> None:
    """What the refusals below are measured against."""
    record = add_record(folder, tmp_path / "records")
    assert read_run(record).summary == read_run(folder).summary
    assert read_run(record).metrics == read_run(folder).metrics
    ((summary,),) = read_summaries(tmp_path / "records").values()
    assert summary["top1"] == read_run(folder).evaluations()[-1]["top1"]


FORGED: dict[str, dict[str, Any]] = {
    "another experiment": {"experiment": "vit_b16_b4096/quadratic_h4"},
    "out of the records": {"experiment": "../../../escaped"},
    "an absolute path": {"experiment": "/tmp/absolute"},
    "a better accuracy": {"top1": 99.99},
    "another loss": {"val_loss": 0.01},
    "more steps": {"steps": 93_600},
    "more averages": {"averages": 9_711},
    "less time": {"train_seconds": 0.5},
    "another seed": {"seed": 7},
    "other settings": {"config_hash": "0"},
    "another network": {"model": "vit_b16"},
    "more images": {"train_images": 1_281_167},
    "no number": {"evaluation_seconds": float("nan")},
    "a negative number": {"bytes_sent_per_worker": -5},
    "text for a number": {"best_top1": "100"},
    "no plan": {"planned": [1]},
    "a plan that is no number": {"planned": {"averages": "many"}},
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_summary_that_is_not_of_the_run_is_refused(
    folder: Path, tmp_path: Path, forgery: str
) -> None:
    change(folder / "summary.json", **FORGED[forgery])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ReportError) as refused:
        add_record(folder, tmp_path / "records")
    assert f"{folder}/summary.json" in str(refused.value)
    assert next(iter(FORGED[forgery])) in str(refused.value)
    assert set(tmp_path.rglob("*")) == before


def rename(folder: Path, experiment: str) -> None:
    """In all files alike."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"experiment": experiment}))
    change(folder / "summary.json", experiment=experiment)


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/absolute", "a/../../b", ".", ""])
def test_a_name_that_leads_out_of_the_records_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    rename(folder, name)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ReportError, match="is not a path inside the records"):
        add_record(folder, tmp_path / "records")
    assert set(tmp_path.rglob("*")) == before


def test_a_run_that_poses_as_an_experiment_is_refused(folder: Path, tmp_path: Path) -> None:
    rename(folder, "vit_b16_b4096/quadratic_h4")
    with pytest.raises(ReportError, match=r"differs from configs/experiment/vit_b16_b4096/quad"):
        add_record(folder, tmp_path / "records")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", b"", "config.yaml cannot be read (not a YAML mapping)"),
        ("config.yaml", bytes(range(256)), "config.yaml cannot be read"),
        ("summary.json", b"{}", "summary.json contradicts config.yaml"),
        ("environment.json", b"[]", "environment.json cannot be read (not a JSON object)"),
        (
            "data.json",
            b'{"train_images": -3}',
            "data.json: train_images=-3 is not enough for a run",
        ),
        ("metrics.jsonl", b"", "top1="),
        ("metrics.jsonl", b"5\n", "metrics.jsonl, line 1, is damaged"),
    ],
)
def test_a_damaged_run_is_no_record(
    folder: Path, tmp_path: Path, name: str, text: bytes, message: str
) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ReportError) as refused:
        add_record(folder, tmp_path / "records")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "records").exists()


def test_nothing_of_the_site_is_recorded(folder: Path, tmp_path: Path) -> None:
    """Keys, accounts, addresses, paths, names of users and machines, wherever they may be."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    hash_before = settings_hash(settings)
    settings["cluster"] |= {
        "launcher": "slurm",
        "environment": {"WANDB_API_KEY": "SECRET-1"},
        "setup": ["export HF_TOKEN=SECRET-2"],
        "account": "SECRET-3",
        "sbatch": {"mail-user": "SECRET-4@example.org"},
        "python": "/home/SECRET-5/bin/python",
    }
    settings["data"]["root"] = "/home/SECRET-6/data"
    settings["runs_dir"] = "/home/SECRET-7/runs"
    settings["tracking"]["wandb_entity"] = "SECRET-8"
    assert settings_hash(settings) == hash_before  # all of it is execution
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    change(folder / "environment.json", host="SECRET-9", user="SECRET-10")
    change(folder / "data.json", root="SECRET-11")
    change(folder / "summary.json", folder="SECRET-12")
    with pytest.raises(ReportError, match="folder='SECRET-12'"):  # what no run writes there
        add_record(folder, tmp_path / "records")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["folder"]
    (folder / "summary.json").write_text(json.dumps(summary))
    record = add_record(folder, tmp_path / "records")
    for path in record.iterdir():
        assert "SECRET" not in path.read_text(), path.name
    assert json.loads((record / "environment.json").read_text())["python"]
    assert read_run(record).config == read_run(folder).config


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    change(folder / "summary.json", top1=99.99)
    line = [str(ROOT / "scripts" / "tables.py"), "add", str(folder)]
    refused = call([sys.executable, *line])
    assert (refused.returncode, refused.stdout) == (2, "")
    (told,) = refused.stderr.splitlines()
    assert told.startswith(f"refused: {folder}/summary.json contradicts config.yaml")
