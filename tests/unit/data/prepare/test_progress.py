"""Progress on standard error: a bar for people, a few lines for log files."""

import contextlib
import os
import sys

import pytest

from qsr.data.prepare import progress
from qsr.data.prepare.progress import show_progress


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("train", 2000, "images") as show:
        show(1)
        show(2000)
    assert capsys.readouterr().err == ""  # it took less than QUIET_SECONDS
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with show_progress("train", 2000, "images") as show:
        show(1)
        show(1500)
    printed = capsys.readouterr()
    assert printed.err == "train: 1 of 2,000 images\ntrain: 1,500 of 2,000 images\n"
    assert printed.out == ""


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with show_progress("train", 2000, "images") as show:
            show(1500)
            print("broken.jpg: empty")  # to a file, not into the bar
            show(2000)
    shown = ""
    with contextlib.suppress(OSError):  # the end
        while True:
            shown += os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "train" in shown
    assert "2000/2000" in shown
    assert "broken" not in shown
    assert capsys.readouterr().out == "broken.jpg: empty\n"
