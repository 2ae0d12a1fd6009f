"""Signals that ask a run to stop: a flag that the ranks agree on where they can stop.

A cluster that wants its machines back sends a signal and kills a while later. The handler only
sets a flag, because a handler must not save, let alone take part in a collective: the other ranks
may not have got the signal, or stand elsewhere. At every step border the ranks tell each other
whether one of them has it, and then all stop after the same step.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType

from qsr.distributed import Communicator, PendingAny


class StopRequestedError(Exception):
    """A stop was agreed in the middle of something that can be done again. On every rank."""


class StopFlag:
    """Whether this process was asked to stop: by a signal, or by the launcher that started it,
    which sets `shared` when it gets one."""

    def __init__(self, shared: Event | None = None) -> None:
        self._signal: str | None = None
        self._shared = shared

    @property
    def reason(self) -> str | None:
        """What asked for the stop; None: go on."""
        if self._signal is None and self._shared is not None and self._shared.is_set():
            return "a signal to the launcher"
        return self._signal

    @contextmanager
    def listening(self, names: Sequence[str]) -> Iterator[None]:
        """Note the signals of these names, for example "SIGTERM", instead of dying of them. For
        the main thread."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._signal = signal.Signals(number).name

        with _handling(names, note):
            yield


@contextmanager
def passing_on(names: Sequence[str], shared: Event) -> Iterator[None]:
    """In a launcher: ask the ranks to stop, through `shared`, when one of the signals comes. The
    launcher goes on waiting for them, and they end when they have saved."""
    with _handling(names, lambda _number, _frame: shared.set()):
        yield


@contextmanager
def _handling(
    names: Sequence[str], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    before = {name: signal.signal(signal.Signals[name], handler) for name in names}
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(signal.Signals[name], old)


class Agreement:
    """Whether any rank was asked to stop, as all ranks know it."""

    def __init__(self, communicator: Communicator, flag: StopFlag) -> None:
        self._communicator = communicator
        self._flag = flag
        self._pending: PendingAny | None = None

    def asked(self) -> bool:
        """Collective: whether any rank had the signal when all called this the last time.

        The answer travels while the ranks compute on, so that none waits for the slowest at every
        step. A stop is therefore agreed one call after the signal.
        """
        answer = self.settle()
        self._pending = self._communicator.begin_any(self._flag.reason is not None)
        return answer

    def settle(self) -> bool:
        """Collective: the answer that is still on its way."""
        pending, self._pending = self._pending, None
        return pending is not None and pending.wait()

    def check(self) -> None:
        """Collective: raise StopRequestedError if a stop is agreed."""
        if self.asked():
            raise StopRequestedError
