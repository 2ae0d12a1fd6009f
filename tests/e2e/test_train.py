"""The command line, as a user gives it: real processes, real images, real files."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qsr import build
from qsr.config.load import CONFIG_DIR, load_config, run_folder, to_dict
from qsr.errors import ConfigError
from qsr.run.folder import read_rows
from tests.cli import TORCHRUN, call, command, folder_in, same_weights


def test_the_run_folder_holds_what_it_promises(uninterrupted: Path) -> None:
    assert sorted(path.name for path in uninterrupted.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "run.lock",
        "summary.json",
    ]
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["packages"]["torch"]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["averages"] == summary["planned"]["averages"] == 9
    assert summary["volume"] == 9 / 44
    # 2 (K - 1) / K = 1, of 78,042 parameters in float32
    assert summary["bytes_sent_per_worker"] == 9 * 4 * 78_042
    assert summary["top1"] > 50
    rows = read_rows(uninterrupted / "metrics.jsonl")[0]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("eval", 22),
        ("train", 44),
        ("eval", 44),
    ]
    assert all(row["images"] == 355 for row in rows if row["kind"] == "eval")
    # newest two, and nothing half-made
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == [
        "step_000000040",
        "step_000000044",
    ]


LOCAL = ("experiment=demo/constant",)  # H = 4
SWAP = ("experiment=demo/parallel", "sync=swap", "sync.switch_epoch=1")
MOMENTS = ("sync.average_momentum=true", "sync.average_second_moment=true")


@pytest.mark.parametrize(
    ("settings", "averages", "megabytes"),
    [
        (("experiment=demo/parallel",), 44, 44 * 0.312_168),
        (LOCAL, 11, 11 * 0.312_168),
        ((*LOCAL, "sync.average_momentum=true"), 11, 2 * 11 * 0.312_168),
        ((*LOCAL, "optimizer=adamw", *MOMENTS), 11, 3 * 11 * 0.312_168),
        ((*SWAP, "sync.average_momentum=true"), 23, 24 * 0.312_168),  # one round at the end
    ],
)
def test_a_run_averages_and_sends_what_its_plan_said(
    settings: tuple[str, ...], averages: int, megabytes: float, digits: Path, tmp_path: Path
) -> None:
    """Two epochs of 22 steps; 78,042 parameters; each of two workers sends all that it gives."""
    config = load_config(
        [
            *(*settings, "workers=2", "epochs=2", "schedule.warmup_epochs=1"),
            *("cluster.ranks=1", "cluster.threads_per_rank=1"),
            *("tracking=none", "tracking.progress=false", f"runs_dir={tmp_path}"),
            f"data.root={digits}",
            *("speed=paper_2x8", "speed.machines=1", "speed.ranks_per_machine=1"),
            "speed.seconds_per_image={small_resnet@32/fp32: 0.001}",
        ]
    )
    summary = build.run(config)
    assert isinstance(summary, dict)
    assert summary["averages"] == summary["planned"]["averages"] == averages
    sent = summary["bytes_sent_per_worker"]
    assert sent == summary["planned"]["bytes_sent_per_worker"] == round(1e6 * megabytes)
    # one rank computes 64 images a step, 1 ms each, and has nobody to send to
    assert summary["planned"]["train_seconds"] == pytest.approx(44 * 0.064)
    assert summary["planned"]["communication_seconds"] == 0.0


def test_torchrun_makes_the_same_run(digits: Path, tmp_path: Path, uninterrupted: Path) -> None:
    script = command(digits, tmp_path)[1:]
    done = call([*TORCHRUN, *script])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1  # one rank speaks
    assert same_weights(folder_in(tmp_path), uninterrupted)


def test_one_process_with_two_virtual_workers_makes_the_same_run(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    # with as many threads as the two ranks had: another number adds in another order
    one = ("cluster.ranks=1", "cluster.threads_per_rank=1")
    build.run(load_config(command(digits, tmp_path, *one)[2:]))
    ours = folder_in(tmp_path) / "checkpoints" / "step_000000044"
    theirs = uninterrupted / "checkpoints" / "step_000000044"
    for name in ("worker_000.safetensors", "worker_001.safetensors", "shared.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("stop", [None, pytest.param(31, marks=pytest.mark.slow)])
def test_one_worker_of_two_ranks_is_data_parallel_training_on_two_workers(
    digits: Path, tmp_path: Path, stop: int | None
) -> None:
    """Bit for bit, whatever the rule, and resumed in the middle of a round."""
    parallel = command(digits, tmp_path / "parallel", "experiment=demo/parallel")
    hybrid = command(digits, tmp_path / "hybrid", "workers=1", "ranks_per_worker=2")
    assert call(parallel).returncode == 0
    if stop is not None:
        assert f"stopped after step {stop}" in call([*hybrid, f"stop_after_steps={stop}"]).stdout
    assert call(hybrid).returncode == 0
    ours, theirs = (folder_in(tmp_path / name) for name in ("hybrid", "parallel"))
    one, other = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    summary = json.loads((ours / "summary.json").read_text())
    assert (summary["workers"], summary["ranks_per_worker"], summary["ranks"]) == (1, 2, 2)
    assert summary["bytes_sent_per_worker"] == summary["planned"]["bytes_sent_per_worker"] == 0
    environment = json.loads((ours / "environment.json").read_text())
    assert environment["ranks_per_worker"] == 2


def test_another_run_in_the_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    first = load_config(command(digits, tmp_path, "cluster.ranks=1", "stop_after_steps=2")[2:])
    build.run(first)
    path = build.prepare(first).folder.config
    path.write_text(path.read_text().replace("alpha: 0.4375", "alpha: 0.3"))
    with pytest.raises(ConfigError, match=r"other settings .sync.alpha: 0.3 -> 0.4375.: delete it"):
        build.prepare(first)
    path.write_text("workers: [")
    with pytest.raises(ConfigError, match="cannot be read by this version"):
        build.prepare(first)
    before_vit_pytorch = to_dict(first) | {"model": to_dict(first)["model"] | {"name": "small_vit"}}
    del before_vit_pytorch["fp16_overflow"]
    path.write_text(yaml.safe_dump(before_vit_pytorch))
    with pytest.raises(ConfigError, match="small_vit were not the paper's networks"):
        build.prepare(first)


def test_other_data_under_the_same_name_are_refused(digits: Path, tmp_path: Path) -> None:
    """The folder's name does not tell where the data are, or which loader reads them."""
    counts = ("data.train_images=null", "data.val_images=null", "stop_after_steps=2")
    one = command(digits, tmp_path / "runs", "cluster.ranks=1", "data.loader=auto", *counts)[2:]
    build.run(load_config(one))
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    assert build.prepare(load_config([*one, f"data.root={other}"])).summary is None  # only moved
    sorted((other / "train" / "7").iterdir())[0].unlink()
    with pytest.raises(ConfigError, match=r"other data .train_images: 1442 -> 1441; train_files"):
        build.prepare(load_config([*one, f"data.root={other}"]))
    path = folder_in(tmp_path / "runs") / "data.json"
    path.write_text(path.read_text().replace('"dali"', '"torchvision"'))
    with pytest.raises(ConfigError, match="loader: torchvision -> dali"):
        build.prepare(load_config(one))


@pytest.mark.slow
def test_torchrun_with_ranks_that_do_not_divide_the_workers(digits: Path, tmp_path: Path) -> None:
    torchrun = [*TORCHRUN[:-1], "--nproc-per-node=3"]
    refused = call([*torchrun, *command(digits, tmp_path)[1:]])
    assert refused.returncode != 0
    assert "3 ranks were launched, which do not divide workers=2" in refused.stderr


EXPERIMENTS = sorted(
    path.relative_to(CONFIG_DIR / "experiment").with_suffix("").as_posix()
    for path in (CONFIG_DIR / "experiment").rglob("*.yaml")
    if not path.stem.startswith("glyphs_")  # tests/e2e/test_glyph_evidence.py
)
DEMOS = [name for name in EXPERIMENTS if name.startswith("demo/")]
SMALL = [
    *((name, "", loader) for name in DEMOS for loader in ("dali", "torchvision")),
    *(
        # one of each recipe is quick
        pytest.param(name, "rehearsal=digits", "dali", marks=() if first else pytest.mark.slow)
        for _, names in itertools.groupby(EXPERIMENTS, lambda name: name.partition("/")[0])
        for first, name in ((i == 0, name) for i, name in enumerate(names))
        if name not in DEMOS
    ),
]


@pytest.mark.parametrize(("name", "rehearsal", "loader"), SMALL)
def test_every_experiment_takes_steps(
    name: str, rehearsal: str, loader: str, digits: Path, tmp_path: Path
) -> None:
    rows = steps(5, digits, tmp_path, f"experiment={name}", f"data.loader={loader}", rehearsal)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 < row["loss"] < 10 for row in rows)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit_b16_b4096/constant_h4", marks=pytest.mark.slow),
        "resnet152_b4096/constant_h2",
    ],
)
def test_the_published_models_take_steps(name: str, digits: Path, tmp_path: Path) -> None:
    """The recipe as it is, but for the images, their number, H, and fp16, which CPUs emulate."""
    rows = steps(
        2, digits, tmp_path, f"experiment={name}", "data=digits", "workers=2", "global_batch=8",
        "micro_batch=2", "sync.h=2", "precision=fp32",
    )  # fmt: skip
    assert [row["averages"] for row in rows] == [0, 1]
    assert all(0 < row["loss"] < 10 for row in rows)


def steps(number: int, digits: Path, runs: Path, *settings: str) -> list[dict[str, Any]]:
    """The rows of metrics of a session of so many steps, in this process."""
    config = load_config(
        [
            *(f"data.root={digits}", f"runs_dir={runs}", *filter(None, settings)),
            *("cluster.ranks=1", "cluster.threads_per_rank=1"),
            *("tracking=none", "tracking.progress=false"),
            *("tracking.log_every_steps=1", f"stop_after_steps={number}"),
        ]
    )
    assert build.run(config) == build.Stopped(number, "stop_after_steps", by_signal=False)
    return read_rows(run_folder(config) / "metrics.jsonl")[0]
