"""What is told to a person, and never decides: a program goes on and ends with its own status while
its output is full, closed, slow or gone. Standard library only.

`program` and `printer` are how every script begins; ranks that are started otherwise call `guard`.
"""

import atexit
import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

STALL_SECONDS = 1.0
"""An output that is behind for so long is not waited for any more, until it has caught up."""

MOST_WAITING = 1024 * 1024
"""Bytes that wait for such an output; what is said beyond is dropped."""

_PIECE = 4096
"""Bytes that are written at once: a pipe takes so many whole, beside those of other ranks."""


def say(text: str) -> None:
    """Tell a person, on standard output, if it takes the text."""
    _put(text, sys.stdout)


def warn(text: str) -> None:
    """The same on standard error."""
    _put(text, sys.stderr)


def printable(text: str) -> str:
    """`text` as one line that every stream takes: line breaks, and bytes of a name that are no
    UTF-8, are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how Python decodes a byte of a name that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def _put(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # `print` would take standard output then
        # ValueError: it was closed; RuntimeError: in a signal's handler, in the middle of a print
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(text, file=stream, flush=True)


def program(main: Callable[[list[str]], int]) -> NoReturn:
    """For a script that does something: `main` gets the command line's words and returns the exit
    status, which holds whatever becomes of the output."""
    guard()
    sys.exit(main(sys.argv[1:]))


def printer(main: Callable[[list[str]], int]) -> NoReturn:
    """For a script whose output is all that is wanted of it. Without a reader it ends as the
    shell's tools do, by SIGPIPE; if the text cannot be written, with one line and status 1."""
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
        if error.filename is not None:  # not the output's
            raise
        warn(f"failed: the output cannot be written: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left once more
        status = 1
    sys.exit(status)


def guard(*names: str) -> None:
    """From now on standard output and standard error (or the one that is named) take everything:
    neither raises, blocks, or spoils the exit status. Call it first in a process, in its main
    thread; streams that somebody has replaced, as a notebook does, stay as they are."""
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
    """The next file that is opened would get the number of a standard stream that is closed, and
    what libraries in other languages say would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _finish(stream: TextIO, outlet: "_Outlet") -> None:
    stream.flush()
    outlet.finish()


class _Outlet(io.BufferedIOBase):
    """A standard stream that a thread writes, because only a thread may wait for ever.

    Libraries in other languages write to the stream's number themselves: while the output takes
    nothing, that stands for /dev/null.
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
        self._changed = threading.Condition()  # reentrant: a signal's handler may write, too
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
        """Wait until everything is written, if the output takes it."""
        if self._ended or self._stalled:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting, STALL_SECONDS):
                self._set_stalled(True)

    def finish(self) -> None:
        """Wait for a slow reader as long as it reads, and end the thread: a daemon thread that
        the interpreter stops may hold a lock for ever."""
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
            with self._changed:  # without a text, too, it is seen that the output has stalled
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
        """Returns how many bytes are done with."""
        try:
            return os.write(self._target, text)
        except BlockingIOError:  # another program has made it one that does not wait
            time.sleep(0.01)
            return 0
        except OSError:  # full, or nobody is there any more
            return len(text)

    def _set_stalled(self, stalled: bool) -> None:
        if stalled != self._stalled:
            self._stalled = stalled
            os.dup2(self._nowhere if stalled else self._target, self._number)
