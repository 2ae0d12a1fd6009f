"""Show the status of runs, one line each.

    qsr status runs
    qsr status runs/vit_b16_b4096 runs/demo/quadratic/seed_1
    qsr status runs --watch              the same, again and again, until Ctrl-C

Reads the run folders at and below these paths, and squeue for submitted runs. Columns: state; steps
done; epoch; H; share of the training time spent waiting for data; updates skipped (fp16 only); last
evaluation; time left; and the run: on a terminal what tells it apart, elsewhere its folder.
--watch looks every 5 seconds, and asks squeue every 30. Without a terminal it prints the table
whenever it changes. Exit status: 0, 2 if there are no runs (--watch waits for them), or 130 after
Ctrl-C.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from qsr.cli.usage import show_help
from qsr.cluster.slurm import JobState, query
from qsr.errors import INTERRUPTED, REFUSED, SlurmError
from qsr.ops.status import RunStatus, job_of, read_status
from qsr.ops.status_table import screen, status_table
from qsr.output import printer, warn
from qsr.report.collect import find_runs

_WATCH = "--watch"
_REFRESH_SECONDS = 5.0
_SLURM_SECONDS = 30.0  # squeue loads the controller that all users share


def main(arguments: list[str]) -> int:
    words = [word for word in arguments if word != _WATCH]
    if not words or {"-h", "--help"} & set(words):
        return show_help(__doc__)
    for word in words:
        if word.startswith("--") and not Path(word).exists():
            warn(f"refused: status has no {word}; --help says what it takes")
            return REFUSED
    paths = list(map(Path, words))
    try:
        if _WATCH in arguments:
            _wait_for_runs(paths)
            _watch(_looking(paths))
        if not find_runs(paths):
            absent = next((path for path in paths if not path.exists()), None)
            what = "runs in " + ", ".join(map(str, paths)) if absent is None else f"folder {absent}"
            warn(f"refused: no {what}")
            return REFUSED
        look = _looking(paths)
        print(status_table(look(), _columns()))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _wait_for_runs(paths: Sequence[Path]) -> None:
    """A run makes its folder some seconds after it was started."""
    told = False
    while not find_runs(paths):
        if not told:
            warn(f"no runs in {', '.join(map(str, paths))} yet: waiting for them")
        told = True
        time.sleep(1)


def _looking(paths: Sequence[Path]) -> Callable[[], list[RunStatus]]:
    """A function that reads the status of all runs at and below these paths."""
    asked, numbers_then = -_SLURM_SECONDS, set[str]()
    jobs: dict[str, JobState] | None = {}

    def look() -> list[RunStatus]:
        nonlocal asked, jobs, numbers_then
        folders = find_runs(paths)
        numbers = {job for folder in folders if (job := job_of(folder)) is not None}
        if numbers != numbers_then or time.monotonic() - asked >= _SLURM_SECONDS:
            try:
                jobs = query(sorted(numbers))
            except SlurmError as error:
                if jobs is not None:
                    warn(f"cannot query Slurm: {error}")
                jobs = None
            asked, numbers_then = time.monotonic(), numbers
        return [read_status(folder, jobs) for folder in folders]

    return look


def _columns() -> int | None:
    """Width of the terminal; None without one."""
    return os.get_terminal_size().columns or None if sys.stdout.isatty() else None


def _watch(look: Callable[[], list[RunStatus]]) -> NoReturn:
    """Show the table again and again. Ends by KeyboardInterrupt or another signal."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in (None, "dumb"):
        _print_changes(look)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # the cursor is hidden meanwhile, and must come back
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console()

    def table() -> Text:
        return Text(screen(look(), console.width, console.height - 1), no_wrap=True)

    with Live(table(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            time.sleep(_REFRESH_SECONDS)
            live.update(table(), refresh=True)


def _print_changes(look: Callable[[], list[RunStatus]]) -> NoReturn:
    before = ""
    while True:
        now = status_table(look())
        if now != before:
            print(now, end="\n\n", flush=True)
        before = now
        time.sleep(_REFRESH_SECONDS)


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    printer(main)
