"""Progress of long operations on a data set, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsr.output import warn

QUIET_SECONDS = 30.0
"""Without a terminal, at most one line is printed in this time."""


@contextmanager
def show_progress(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, or occasional lines elsewhere. Yields a function to call
    with the number done so far."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(name, total, unit)
        return
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
        # prints appear above the bar, unless they go to a file
        redirect_stdout=sys.stdout.isatty(),
    )
    task = bar.add_task(name, total=total)
    with bar:
        yield lambda done: bar.update(task, completed=done)


class _Lines:
    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._quiet_until = time.monotonic() + QUIET_SECONDS

    def __call__(self, done: int) -> None:
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            line = f"{self._name}: {done:,} of {self._total:,} {self._unit}"
            warn(line)
