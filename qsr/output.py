"""Output for people, which never affects a run: a program keeps running, and exits with its own
status, even if its output is full, closed, slow or gone. Standard library only.

Every script starts with `program` or `printer`; ranks that are started otherwise call `guard`.
"""

import atexit
import contextlib
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

STALL_SECONDS = 1.0
"""An output that blocks for this long has stalled: nothing waits for it until it catches up."""

MOST_WAITING = 1024 * 1024
"""Bytes that are buffered for a stalled output; the rest is dropped."""

_PIECE = 4096
"""Bytes per write: a pipe takes this many atomically, so that lines of several ranks do not mix."""


def say(text: str) -> None:
    """Print a line on standard output, in the words of the caller, ignoring errors."""
    _put(in_words_of_caller(text), sys.stdout)


def warn(text: str) -> None:
    """Print a line on standard error, in the words of the caller, ignoring errors."""
    _put(in_words_of_caller(text), sys.stderr)


def in_words_of_caller(text: str) -> str:
    """`text` with its commands as the user gives them: `qsr NAME`, or `python scripts/NAME.py`
    where a script of that folder was started."""
    folder = Path(sys.argv[0]).parent
    if folder.name != "scripts":
        return text

    def script(found: re.Match[str]) -> str:
        before, name, after = found.groups()
        if not (folder / f"{name}.py").exists():
            return found[0]
        if before == "-m " or before == after == "`":
            return f"scripts/{name}.py"
        return f"{before}python scripts/{name}.py{after}"

    return re.sub(r"(-m |`|\b)qsr (\w+)(`|\b)", script, text)


def printable(text: str) -> str:
    """`text` as one line that every stream accepts: line breaks, and bytes of a name that are not
    valid UTF-8, are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # Python's surrogate escape of a byte that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def _put(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # with None, `print` would use standard output
        # ValueError: the stream is closed; RuntimeError: a signal handler interrupted a print
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(text, file=stream, flush=True)


def program(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script that does some work: `main` gets the command-line arguments and returns the exit
    status, which does not depend on whether output can be written."""
    guard()
    sys.exit(main(sys.argv[1:]))


def printer(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script whose only purpose is its output. If the reader is gone it dies from SIGPIPE, as
    shell tools do; if the output cannot be written it ends with one line and status 1."""
    guard("stderr")
    if sys.stdout is sys.__stdout__:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        try:
            status = main(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # not an error of the output
            raise
        warn(f"failed: the output cannot be written: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes the rest again at exit
        status = 1
    sys.exit(status)


def guard(*names: str) -> None:
    """Make standard output and standard error (or the named one) accept everything from now on:
    writing neither raises, blocks, nor changes the exit status. Call it first in a process, in the
    main thread; streams that were replaced, as in a notebook, are left alone."""
    _open_missing()
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__") or (names and name not in names):
            continue
        if old is not None:
            with contextlib.suppress(OSError, ValueError):
                old.flush()
        outlet = _Outlet(number, f"<{name}>")
        encoding = "utf-8" if old is None else old.encoding
        new = io.TextIOWrapper(outlet, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, new)
        atexit.register(_finish, new, outlet)


def _open_missing() -> None:
    """Open /dev/null for closed standard streams. Otherwise the next opened file would get such a
    stream's descriptor, and output of C libraries would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _finish(stream: TextIO, outlet: "_Outlet") -> None:
    stream.flush()
    outlet.finish()


class _Outlet(io.BufferedIOBase):
    """A standard stream written by a thread, because only a thread may block forever.

    C libraries write directly to the stream's descriptor: while the output has stalled, it points
    to /dev/null.
    """

    def __init__(self, number: int, name: str) -> None:
        self.name = name
        self._number = number
        self._target = os.dup(number)
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._terminal = os.isatty(number)
        self._waiting = bytearray()
        self._stalled = False
        self._ended = False
        self._changed = threading.Condition()  # reentrant, because signal handlers may write too
        self._thread = threading.Thread(target=self._pass_on, name=f"output {number}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return self._terminal

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._ended:
            if not self._stalled:
                self._write_now(bytes(data))
            return len(data)
        with self._changed:
            if not (self._stalled and len(self._waiting) > MOST_WAITING):
                self._waiting += data
                self._changed.notify_all()
        return len(data)

    def flush(self) -> None:
        """Wait until everything is written, or until the output has stalled."""
        if self._ended or self._stalled:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting, STALL_SECONDS):
                self._set_stalled(True)

    def finish(self) -> None:
        """Wait for a slow reader as long as it keeps reading, and end the thread, because a daemon
        thread that the interpreter kills may hold a lock forever."""
        with self._changed:
            while self._waiting and self._changed.wait(STALL_SECONDS):
                pass
            self._ended = True
            self._changed.notify_all()
        self._thread.join(STALL_SECONDS)

    def _pass_on(self) -> None:
        poll = select.poll()
        poll.register(self._target, select.POLLOUT)
        while not self._ended:
            with self._changed:  # times out, so that a stall is noticed without new text too
                self._changed.wait_for(lambda: bool(self._waiting) or self._ended, STALL_SECONDS)
                text = bytes(self._waiting[:_PIECE])
            if not poll.poll(1000 * STALL_SECONDS):
                with self._changed:
                    self._set_stalled(True)
                continue
            written = self._write_now(text) if text else 0
            with self._changed:
                del self._waiting[:written]
                self._set_stalled(self._stalled and bool(self._waiting))
                self._changed.notify_all()

    def _write_now(self, text: bytes) -> int:
        """Returns how many bytes were written or given up."""
        try:
            return os.write(self._target, text)
        except BlockingIOError:  # another program has made it non-blocking
            time.sleep(0.01)
            return 0
        except OSError:  # the disk is full, or the reader is gone
            return len(text)

    def _set_stalled(self, stalled: bool) -> None:
        if stalled != self._stalled:
            self._stalled = stalled
            os.dup2(self._nowhere if stalled else self._target, self._number)
