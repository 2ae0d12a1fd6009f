"""Signals that ask a run to stop, recorded in a flag on which the ranks then agree.

A cluster that wants its machines back sends a signal and kills the job a while later. The handler
only sets a flag. It must not save or take part in a collective, because the other ranks may not
have received the signal, or may be elsewhere in the code. In every step the ranks exchange their
flags, together with the values that must be equal on all of them, and a few steps later all stop
after the same step.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType

from qsr.output import warn


class StopFlag:
    """Whether this process was asked to stop: by a signal, or by its launcher, which writes to the
    pipe `launcher` when it receives one. The message is never read, so that all ranks see it."""

    def __init__(self, launcher: Connection | None = None) -> None:
        self._signal: str | None = None
        self._launcher = launcher

    @property
    def reason(self) -> str | None:
        """What asked for the stop; None if nothing did."""
        if self._signal is None and self._launcher is not None and self._launcher.poll():
            return "a signal to the launcher"
        return self._signal

    @contextmanager
    def listening(self, names: Sequence[str]) -> Iterator[None]:
        """Record the signals of these names, for example "SIGTERM", instead of dying from them.
        Main thread only."""
        with handling(names, self._note):
            yield

    @contextmanager
    def passing_on(self, names: Sequence[str], ranks: Connection) -> Iterator[None]:
        """In a launcher: record the signals and ask the ranks to stop. The launcher keeps waiting
        for the ranks, which exit after saving."""

        def pass_on(number: int, frame: FrameType | None) -> None:
            new = self._signal is None
            self._note(number, frame)
            if new:
                ranks.send_bytes(b"stop")

        with handling(names, pass_on):
            yield

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            warn("saving and stopping; press Ctrl-C again to exit immediately")


@contextmanager
def handling(
    names: Sequence[str], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Install `handler` for these signals, except those that this program was started to ignore (as
    with nohup). Main thread only."""
    numbers = [signal.Signals[name] for name in names]
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    # in a rank they have been blocked since it was forked, see processes.py
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, old in before.items():
            signal.signal(number, old)
