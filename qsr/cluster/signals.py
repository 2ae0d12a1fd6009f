"""Signals that ask a run to stop: a flag that the ranks agree on where they can stop.

A cluster that wants its machines back sends a signal and kills a while later. The handler only
sets a flag, because a handler must not save, let alone take part in a collective: the other ranks
may not have got the signal, or stand elsewhere. In every step the ranks tell each other whether one
of them has it, and some steps later all stop after the same one. With it travels what they must
agree on.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType

from qsr.output import warn


class StopFlag:
    """Whether this process was asked to stop: by a signal, or by the launcher that started it,
    which sends something on `launcher` when it gets one. Nobody takes it from there: it stays for
    all ranks to see."""

    def __init__(self, launcher: Connection | None = None) -> None:
        self._signal: str | None = None
        self._launcher = launcher

    @property
    def reason(self) -> str | None:
        """What asked for the stop; None: go on."""
        if self._signal is None and self._launcher is not None and self._launcher.poll():
            return "a signal to the launcher"
        return self._signal

    @contextmanager
    def listening(self, names: Sequence[str]) -> Iterator[None]:
        """Note the signals of these names, for example "SIGTERM", instead of dying of them. For
        the main thread."""
        with handling(names, self._note):
            yield

    @contextmanager
    def passing_on(self, names: Sequence[str], ranks: Connection) -> Iterator[None]:
        """In a launcher: note them, and ask the ranks to stop. The launcher goes on waiting for
        them, and they end when they have saved."""

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
            warn("stopping as soon as everything is saved; Ctrl-C again ends at once")


@contextmanager
def handling(
    names: Sequence[str], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Have `handler` called when one of these signals comes, but for those that whoever started
    this program had it ignore, as nohup does. In the main thread."""
    numbers = [signal.Signals[name] for name in names]
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    # a rank has kept them waiting since it was forked, see processes
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, old in before.items():
            signal.signal(number, old)
