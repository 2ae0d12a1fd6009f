"""The command line, as a user gives it: a run of two workers on the digits."""

import contextlib
import functools
import importlib.util
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from qsr.config.load import CONFIG_DIR

ROOT = CONFIG_DIR.parent
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

RUN = [
    "experiment=demo/quadratic",
    "workers=2",
    "epochs=2",
    "schedule.warmup_epochs=1",
    "tracking=none",
    "seed=3",
]


def program(folder: Path, name: str, text: str) -> None:
    """Make a command, as one of Slurm's where there is none."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def command(digits: Path, runs: Path, *extra: str) -> list[str]:
    return [*TRAIN, *RUN, f"data.root={digits}", f"runs_dir={runs}", *extra]


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=240
    )


def call_here(name: str, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A script in this process, which has imported already what it needs."""
    folder = Path.cwd()
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            status = loaded_script(name, root).main([*arguments])
        finally:
            os.chdir(folder)
    return subprocess.CompletedProcess(
        [name, *arguments], status, stdout.getvalue(), stderr.getvalue()
    )


@functools.cache
def loaded_script(name: str, root: Path = ROOT) -> ModuleType:
    """scripts/NAME.py of the repository in `root` as a module."""
    specification = importlib.util.spec_from_file_location(
        f"{name}_script", root / "scripts" / f"{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def refusal(arguments: list[str]) -> str:
    """The one line in which a command refuses these."""
    refused = call(arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    return line


def start(arguments: list[str], stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """In a process group of its own, which `os.killpg(process.pid, ...)` reaches as a whole."""
    return subprocess.Popen(arguments, env=ENVIRONMENT, start_new_session=True, stderr=stderr)


def wait_for(runs: Path, name: str, process: subprocess.Popen[Any]) -> None:
    """Until a file or folder of this name is somewhere below `runs`."""
    deadline = time.monotonic() + 120
    while not is_somewhere(runs, name):
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_somewhere(folder: Path, name: str) -> bool:
    # a folder may be gone before it is looked into, at which `rglob` fails
    return any(name in (*folders, *files) for _, folders, files in os.walk(folder))


def folder_in(runs: Path) -> Path:
    """The only run folder there."""
    (config,) = runs.rglob("config.yaml")
    return config.parent


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
