"""The examples train on digits, on two processes (four for FSDP2) that torchrun starts."""

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli import ROOT, call

EPOCHS = 3


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 10 validation images of each digit."""
    root = tmp_path_factory.mktemp("few")
    for split, number in (("train", 40), ("val", 10)):
        for name in map(str, range(10)):
            (root / split / name).mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:number]:
                shutil.copy(path, root / split / name)
    return root


def torchrun(ranks: int, example: str, *arguments: Any) -> tuple[float, dict[str, Any]]:
    """Accuracy and `sync.summary()`, as an example prints them."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "examples" / example)
    words = [*program, f"--nproc-per-node={ranks}", script, *map(str, arguments)]
    done = call(words)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("accuracy "))
    _, accuracy, summary = line.split(" ", 2)
    return float(accuracy), ast.literal_eval(summary)


def final(folder: Path) -> list[Any]:
    """All tensors of both workers' checkpoints, and what LocalSGD saved."""
    states = [torch.load(folder / f"worker_{rank}.pt") for rank in range(2)]
    return [
        ([t.tolist() for t in model.values()], str(optimizer), sync)
        for model, optimizer, _, sync in states
    ]


def test_the_plain_loop_trains_and_resumes_with_the_same_bits(few: Path, tmp_path: Path) -> None:
    def run(name: str, *more: Any) -> tuple[float, dict[str, Any]]:
        settings = ["--data", few, "--checkpoints", tmp_path / name, "--epochs", EPOCHS]
        return torchrun(2, "plain_torch.py", *settings, *more)

    accuracy, summary = run("whole")
    assert accuracy > 0.5
    assert summary["step"] == summary["total_steps"]
    assert 1 < summary["averages"] < summary["step"]
    _, part = run("parts", "--stop-after", 1)
    assert part["step"] * EPOCHS == summary["step"]
    assert run("parts")[0] == accuracy
    assert final(tmp_path / "parts") == final(tmp_path / "whole")


def test_the_accelerate_loop_trains_and_resumes(few: Path, tmp_path: Path) -> None:
    settings = ["--data", few, "--checkpoints", tmp_path, "--epochs", EPOCHS]
    _, part = torchrun(2, "accelerate_loop.py", *settings, "--stop-after", 1)
    accuracy, summary = torchrun(2, "accelerate_loop.py", *settings)
    assert accuracy > 0.5
    assert part["step"] * EPOCHS == summary["step"] == summary["total_steps"]
    assert part["averages"] < summary["averages"] < summary["step"]


def test_the_lightning_callback_trains(few: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    settings = ["--data", few, "--checkpoints", tmp_path, "--epochs", EPOCHS]
    accuracy, summary = torchrun(2, "lightning_callback.py", *settings)
    assert accuracy > 0.5
    assert summary["step"] == summary["total_steps"]
    assert 1 < summary["averages"] < summary["step"]
    assert (tmp_path / "last.ckpt").exists()
    assert (tmp_path / "last.ckpt.worker1").exists()


def test_two_workers_of_two_processes_are_two_workers_of_twice_the_batch(
    few: Path, tmp_path: Path
) -> None:
    settings = ["--data", few, "--epochs", 2]
    sharded = ["--shards", 2, "--batch", 8, "--save", tmp_path / "sharded.pt"]
    whole = ["--shards", 1, "--batch", 16, "--save", tmp_path / "whole.pt"]
    accuracy, summary = torchrun(4, "fsdp2_hybrid.py", *settings, *sharded)
    reference = torchrun(2, "fsdp2_hybrid.py", *settings, *whole)
    assert accuracy > 0.2
    assert summary["step"] == summary["total_steps"] == reference[1]["step"]
    assert 1 < summary["averages"] == reference[1]["averages"] < summary["step"]
    one, other = torch.load(tmp_path / "sharded.pt"), torch.load(tmp_path / "whole.pt")
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-4)
