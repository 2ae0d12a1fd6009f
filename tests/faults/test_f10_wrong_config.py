"""F10: settings are missing, misspelt or contradict each other. They are refused in one line that
says what would be right, before anything is created, and before torch is loaded if the settings
alone show it."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from qsr.config import schema
from tests.cli import ENVIRONMENT, ROOT, command, refusal

DEMO = "experiment=demo/quadratic"
SLURM = (DEMO, "cluster=slurm")

AS_A_USER = """
import runpy, sys
sys.argv = sys.argv[1:]
status = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as done:
    status = done.code
loaded = sorted({"torch", "torchvision", "timm", "nvidia", "wandb"} & set(sys.modules))
print("loaded:", *loaded)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("train", (DEMO, "wokers=2"), "wokers is not a setting; did you mean workers?"),
        ("train", (DEMO, "+lrr=0.2"), "lrr is not a setting; "),
        ("train", (DEMO, "++sync.alpah=1"), "did you mean sync.alpha?"),
        ("train", (DEMO, "schedule.peak_lr=fast"), "peak_lr='fast': input should be a valid num"),
        ("train", (DEMO, "sync.h_base=4.5"), "h_base=4.5: input should be a valid integer"),
        ("train", (DEMO, "~loss"), "loss is missing"),
        ("train", ("seed=2",), "epochs has no value: set it, or choose an experiment, for examp"),
        ("train", ("experiment=demo/quadratc",), "did you mean demo/quadratic?"),
        ("train", (DEMO, "hydra/launcher=submitit_slurm"), "scripts/submit.py submits to Slurm"),
        ("train", (DEMO, "--config-dir=nowhere"), "--config-dir nowhere: no such folder"),
        ("train", (DEMO, "workers=3"), "global_batch=64 is not divisible by workers=3"),
        ("train", (DEMO, "cluster.ranks=3"), "try cluster.ranks=1 or 2 or 4"),
        ("train", (DEMO, "ranks_per_worker=3"), "by workers=4 x ranks_per_worker=3"),
        ("train", (DEMO, "ranks_per_worker=2", "cluster.ranks=4"), "2 needs 8 ranks: leave out"),
        ("train", (DEMO, "ranks_per_worker=2", "micro_batch=16"), "the local batch 8 (global_b"),
        ("train", (DEMO, "seed=1,2", "workers=3"), "global_batch=64 is not divisible by workers=3"),
        ("submit", (*SLURM, "cluster.partion=gpu"), "did you mean cluster.partition?"),
        ("submit", (*SLURM, "sync.alpha=-1"), "sync.alpha=-1: input should be greater than 0"),
        ("submit", (*SLURM, "cluster.nodes=3"), "24 ranks do not divide workers=4"),
        ("submit", (*SLURM, "ranks_per_worker=4"), "= 8 ranks, but workers=4 x ranks_per_worker=4"),
        (
            "submit",
            (
                *SLURM,
                "ranks_per_worker=2",
                "cluster.gpus_per_node=0",
                "cluster.ranks_per_node=1",
                "cluster.nodes=7",
            ),
            "7 ranks, but workers=4 x ranks_per_worker=2 needs 8",
        ),
        (
            "submit",
            (
                *SLURM,
                "ranks_per_worker=4",
                "global_batch=64",
                "cluster.gpus_per_node=6",
                "cluster.nodes=2",
                "workers=3",
                "global_batch=96",
            ),
            "ranks_per_worker=4 and 6 ranks per node: the ranks of a worker would lie on different",
        ),
        ("submit", (DEMO, "cluster=slrum"), "no such file in configs; did you mean slurm?"),
        ("submit", (*SLURM, "--dryrun"), "unknown option --dryrun; did you mean --dry-run?"),
    ],
)
def test_wrong_settings_are_refused_before_torch_is_loaded(
    script: str, settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = str(ROOT / "scripts" / f"{script}.py")
    refused = subprocess.run(
        [sys.executable, "-c", AS_A_USER, path, *settings],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # where runs/ would be
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    assert refused.returncode == 2
    assert refused.stdout == "loaded:\n"
    (line,) = refused.stderr.splitlines()
    assert line.startswith("refused: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["data.image_size=30", "model=small_vit"],
            "refused: data.image_size=30 is not a multiple",
        ),
        (
            ["model=timm", "model.timm_name=convnext_tny"],
            "refused: model.timm_name=convnext_tny: timm has no such model; closest: convnext_tiny",
        ),
        (["runs_dir=/proc/nothing"], "refused: /proc/nothing/demo/"),
    ],
)
def test_what_only_the_machine_tells_is_refused_before_anything_is_made(
    digits: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    assert refusal(command(digits, tmp_path, *extra)).startswith(message)
    assert list(tmp_path.iterdir()) == []


def names_read(folder: Path) -> set[str]:
    """Attributes that the code below `folder` reads or matches."""
    read = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                read.update(node.kwd_attrs)
    return read


def test_every_setting_is_read_somewhere() -> None:
    read = names_read(ROOT / "qsr")
    settings = {
        f"{cls.__name__}.{field.name}"
        for cls in vars(schema).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
        # a setting with one value names the kind of the others, for the parser
        if get_origin(field.type) is not Literal or len(get_args(field.type)) > 1
    }
    assert len(settings) > 100
    assert {name for name in settings if name.rpartition(".")[2] not in read} == set()
