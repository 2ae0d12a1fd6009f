"""A reference of two rows, and run folders with all the files that a run leaves."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr.config import schema
from qsr.config.load import config_hash, load_config, run_folder, to_dict
from qsr.config.planning import make_plan
from qsr.core.plan import Plan
from qsr.report.study import Study, read_study

WriteRun = Callable[..., Path]

TOP1 = {"constant": (90.0, 91.0, 95.0), "quadratic": (91.0, 93.0, 96.0)}
"""Top-1 of the seeds 1, 2 and 3 of `study`, by rule."""

# rows of the demo's experiments, 330 steps of which QSR averages after 38
REFERENCE = """\
table,experiment,model,optimizer,global_batch,gpus,schedule,rule,h_base,alpha,top1,comm_percent,\
total_hours,comm_hours,source_top1,source_comm,source_hours,source_comm_hours
1b,demo/parallel,vit_b16,adamw,4096,16,cosine,parallel,1,,79.86,100,26.7,7.25,D,D,A,D
1b,demo/quadratic,vit_b16,adamw,4096,16,cosine,quadratic,4,0.4375,80.98,11.5,,,R,D,,
"""


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "tables.csv"
    path.write_text(REFERENCE)
    return path


@cache
def config_of(*settings: str) -> schema.Config:
    return load_config(settings)


@cache
def plan_of(experiment: str) -> Plan:
    return make_plan(config_of(f"experiment={experiment}"), 1442)


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes the folder of a run of the demo, of 72 s and with the given top-1."""

    def write(*settings: str, top1: float = 99.0, **summary: Any) -> Path:
        config = config_of(*settings)
        plan = make_plan(config, 1442)
        folder = tmp_path / run_folder(config)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(1000))
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        last: dict[str, Any] = {"step": plan.total_steps, "epoch": float(config.epochs)}
        rows = [
            {"kind": "train", **last, "train_seconds": summary.get("train_seconds", 72.0)},
            {"kind": "eval", **last, "top1": top1, "loss": 0.5, "seconds": 1.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        contents: dict[str, dict[str, Any]] = {
            "data.json": {"train_images": 1442, "train_files": "3f2a", "loader": "dali"},
            "environment.json": {"python": "3.12.1", "host": "alices-laptop", "cores": 2},
            "summary.json": {
                "experiment": config.experiment,
                "seed": config.seed,
                "config_hash": config_hash(config),
                "rule": config.sync.rule,
                "model": config.model.name,
                "data": config.data.name,
                "workers": config.workers,
                "global_batch": config.global_batch,
                "epochs": config.epochs,
                "train_images": 1442,
                "steps": plan.total_steps,
                "averages": plan.num_rounds,
                "volume": plan.volume,
                "top1": top1,
                "val_loss": 0.5,
                "train_seconds": 72.0,
            },
        }
        contents["summary.json"] |= summary
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        return folder

    return write


@pytest.fixture
def three_seeds(write_run: WriteRun) -> list[Path]:
    """Folders of three seeds of demo/quadratic: mean 81.2, standard deviation 0.2."""
    return [
        write_run("experiment=demo/quadratic", f"seed={seed}", top1=top1)
        for seed, top1 in ((1, 81.0), (2, 81.4), (10, 81.2))
    ]


@pytest.fixture
def study(tmp_path: Path, write_run: WriteRun) -> Study:
    """Two rules with seeds 1 to 3, and a fourth of constant H that has no pair. Differences of QSR
    to constant H: 1, 2 and 1 points."""
    for rule, values in TOP1.items():
        for seed, top1 in enumerate(values, start=1):
            times = {"communication_seconds": 2.0 * seed} if rule == "quadratic" else {}
            best = {"best_top1": top1 + 1} if (rule, seed) != ("quadratic", 3) else {}
            more = {"ranks": 2, "evaluation_seconds": 8.0, **best, **times}
            write_run(f"experiment=demo/{rule}", f"seed={seed}", top1=top1, **more)
    write_run("experiment=demo/constant", "seed=4", top1=92.0, best_top1=93.0, ranks=2)
    return read_study([tmp_path], to="constant H = 4")
