"""The status of runs as a table of plain text, as wide as the terminal."""

import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from qsr.ops.status import RunStatus, State

_TITLES = ("state", "step", "epoch", "H", "waiting", "skipped", "top-1 %", "left")
_WHERE_THERE_IS_ROOM = ("H", "epoch")
"""Columns that a narrow terminal does not show, the first one first."""

_LEAST_NAME = 24
"""Characters that the names of runs get before they are folded."""

_MOST_URGENT: tuple[State, ...] = (
    "failed",
    "running",
    "unknown",
    "preempted",
    "queued",
    "stopped",
    "done",
)


def status_table(runs: Sequence[RunStatus], width: int | None = None) -> str:
    """A header line and a row for each run, with its folder. With a `width` in characters, a run is
    named by the part of its folder that tells it apart, columns are left out where there is no
    room, and names are folded last."""
    names = [str(run.folder) for run in runs] if width is None else what_differs(runs)
    titles = list(_TITLES)
    rows = [dict(zip(_TITLES, _cells(run), strict=True)) for run in runs]
    widths = {title: max([len(title), *(len(row[title]) for row in rows)]) + 2 for title in titles}
    for title in _WHERE_THERE_IS_ROOM:
        if width is not None and sum(widths[name] for name in titles) > width - _LEAST_NAME:
            titles.remove(title)
    lines = ["".join(title.ljust(widths[title]) for title in titles) + "run"]
    for run, row, name in zip(runs, rows, names, strict=True):
        values = "".join(row[title].ljust(widths[title]) for title in titles)
        lines += _row(values, _printable(name), _printable(run.detail), width)
    return "\n".join(line.rstrip() for line in lines)


def _row(values: str, name: str, detail: str, width: int | None) -> list[str]:
    """The lines of a run's row: what does not fit beside its name stands below it."""
    text = f"{name}  ({detail})" if detail else name
    if width is None or len(values) + len(text) <= width:
        return [values + text]
    room = max(width - len(values), 8)
    first, *more = textwrap.wrap(name, room, break_on_hyphens=False) or [""]
    below = textwrap.wrap(f"({detail})" if detail else "", max(width - 4, 8))
    return [
        values + first,
        *(" " * len(values) + piece for piece in more),
        *("    " + piece for piece in below),
    ]


def screen(runs: Sequence[RunStatus], width: int, height: int) -> str:
    """The table for a terminal of this size, below a line that counts the states. Where there is no
    room for all runs, those that need attention are shown."""
    counts = Counter(run.state for run in runs)
    head = ", ".join(f"{counts[state]:,} {state}" for state in _MOST_URGENT if state in counts)
    urgent = sorted(runs, key=lambda run: (_MOST_URGENT.index(run.state), run.folder))
    count = min(len(runs), height)
    while True:
        shown = sorted(urgent[:count], key=lambda run: run.folder)
        lines = [head, *status_table(shown, width).splitlines()]
        if count < len(runs):
            lines.append(f"and {len(runs) - count:,} more")
        if len(lines) <= height or count <= 1:
            return "\n".join(lines)
        count -= 1


def what_differs(runs: Sequence[RunStatus]) -> list[str]:
    """For each run, the parts of its folder's path that not all runs share; a folder named after
    settings has a part for each."""
    paths = [_parts(run.folder) for run in runs]
    common = set.intersection(*map(set, paths)) if len(paths) > 1 else set(paths[0][:-1])
    return [_joined([part for part in parts if part not in common]) for parts in paths]


def _parts(folder: Path) -> list[tuple[int, str]]:
    """Each with its level."""
    return [
        (level, setting)
        for level, part in enumerate(folder.parts)
        for setting in (part.split(",") if "=" in part else [part])
    ]


def _joined(parts: Sequence[tuple[int, str]]) -> str:
    levels = groupby(parts, key=lambda part: part[0])
    return str(Path(*(",".join(text for _, text in level) for _, level in levels)))


def _cells(run: RunStatus) -> tuple[str, ...]:
    total = "?" if run.total_steps is None else f"{run.total_steps:,}"
    minutes = None if run.seconds_left is None else round(run.seconds_left / 60)
    return (
        run.state,
        f"{run.step:,}/{total}",
        "-" if run.epoch is None else f"{run.epoch:.1f}",
        "-" if run.h is None else f"{run.h:,}",
        "-" if run.waiting_percent is None else f"{run.waiting_percent:.0f} %",
        "-" if run.skipped_updates is None else f"{run.skipped_updates:,}",
        "-" if run.top1 is None else f"{run.top1:.2f}",
        "-" if minutes is None else f"{minutes // 60} h {minutes % 60:02} min",
    )


def _printable(text: str) -> str:
    """`text` on one line, with unprintable characters replaced."""
    shown = os.fsencode(text).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "?" for sign in shown)
