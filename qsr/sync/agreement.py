"""The check that ranks make in every step: do all ranks do the same, and was any of them asked to
stop? It runs while they compute, so that no rank waits for it."""

from collections import deque
from collections.abc import Callable

from qsr.sync.communicator import Communicator, PendingSum
from qsr.sync.fingerprint import Fingerprint

MAX_PENDING = 8
"""Checks of an `Agreement` that may be pending within a round. A fast rank may be this many steps
ahead of a slow one before it waits, and a stop may be noticed this many steps late. With 1, every
step would take as long as on its slowest rank."""


class StopRequestedError(Exception):
    """The ranks agreed to stop during something that can be repeated; raised on every rank."""


class Agreement:
    """Checks that all ranks do the same, and tells all of them whether any was asked to stop."""

    def __init__(self, communicator: Communicator, asked_to_stop: Callable[[], bool]) -> None:
        self._communicator = communicator
        self._asked_to_stop = asked_to_stop
        self._pending: deque[tuple[Fingerprint, list[float], PendingSum]] = deque()
        self._stop = False

    def begin(self, mark: Fingerprint) -> None:
        """Collective: tell the other ranks what this one is about to do, and whether it was asked
        to stop, without waiting for their answers."""
        asked = self._asked_to_stop()
        if self._communicator.topology.ranks == 1:  # nobody to ask
            self._stop = self._stop or asked
            return
        numbers = mark.encode()
        total = self._communicator.begin_sum([float(asked), *numbers])
        self._pending.append((mark, numbers, total))

    def settle(self, pending: int = 0) -> bool:
        """Collective: whether any rank was asked to stop, according to the answers so far. Waits
        for all but the last `pending` answers. Raises DisagreementError on a rank whose mark
        differs from the others'."""
        while len(self._pending) > pending:
            mark, numbers, answer = self._pending.popleft()
            asked, *sums = answer.wait().tolist()
            place = self._communicator.topology
            wrong = [total != place.ranks * own for total, own in zip(sums, numbers, strict=True)]
            if any(wrong):
                raise mark.disagreement(place.rank, wrong)
            self._stop = self._stop or asked > 0.0
        return self._stop

    def check(self, mark: Fingerprint) -> None:
        """Collective: raise StopRequestedError if a stop was agreed; otherwise start a check."""
        if self.settle():
            raise StopRequestedError
        self.begin(mark)
