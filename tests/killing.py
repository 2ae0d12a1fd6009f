"""scripts/prepare.py in processes that are killed at chosen moments."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare.py"

OPERATIONS = {
    "open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
}  # fmt: skip
"""Audit events of Python that come before a file operation."""


def start(command: list[str], before: Callable[..., None] | None = None, *by: Any) -> BaseProcess:
    """Start `scripts/prepare.py COMMAND` after `before(*by)` in a process of its own, forked from
    a server that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support", "scipy.io", "rich.progress"])
    process = context.Process(target=_run, args=(command, before, by), daemon=True)
    process.start()
    return process


def killed_at(operation: int, folder: Path, command: list[str]) -> bool:
    """Run a command and kill it when it is about to do its `operation`-th (0-based) file operation
    below `folder`. False: it came to its end before."""
    return _killed(start(command, _die_at, operation, str(folder)), signal.SIGKILL)


def killed_beyond(size: int, command: list[str]) -> bool:
    """Run a command that the kernel kills when it has written `size` bytes of a longer file."""
    return _killed(start(command, _die_beyond, size), signal.SIGXFSZ)


def _killed(process: BaseProcess, by: signal.Signals) -> bool:
    process.join()
    assert process.exitcode in (0, -by), process.exitcode
    return process.exitcode != 0


def _run(command: list[str], before: Callable[..., None] | None, by: tuple[Any, ...]) -> None:
    sys.argv = [str(SCRIPT), *command]
    if before is not None:
        before(*by)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _die_at(operation: int, folder: str) -> None:
    done = 0

    def count(event: str, details: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and any(str(detail).startswith(folder) for detail in details):
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(count)


def _die_beyond(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
