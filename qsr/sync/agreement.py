"""The question that the ranks ask each other in every step: do all do the same, and is any of them
asked to stop? The answer travels while they compute, so that it costs no waiting."""

from collections import deque
from collections.abc import Callable

from qsr.sync.communicator import Communicator, PendingSum
from qsr.sync.fingerprint import Fingerprint

MAX_PENDING = 8
"""Questions of an `Agreement` that may be under way within a round: so many steps one rank may be
ahead of another, whose step just takes longer, without waiting for it, and so many steps later may
a stop be noticed. With one alone every step would take as long as its slowest rank's."""


class StopRequestedError(Exception):
    """A stop was agreed in the middle of something that can be done again. On every rank."""


class Agreement:
    """That all ranks do the same, and whether any was asked to stop, as all ranks know it."""

    def __init__(self, communicator: Communicator, asked_to_stop: Callable[[], bool]) -> None:
        self._communicator = communicator
        self._asked_to_stop = asked_to_stop
        self._pending: deque[tuple[Fingerprint, list[float], PendingSum]] = deque()
        self._stop = False

    def begin(self, mark: Fingerprint) -> None:
        """Collective: tell the other ranks what this one is about to do, and whether it was asked
        to stop. The answer travels while the ranks compute on."""
        asked = self._asked_to_stop()
        if self._communicator.topology.ranks == 1:  # agrees with itself
            self._stop = self._stop or asked
            return
        numbers = mark.encode()
        total = self._communicator.begin_sum([float(asked), *numbers])
        self._pending.append((mark, numbers, total))

    def settle(self, pending: int = 0) -> bool:
        """Collective: whether any rank had been asked to stop, as far as the answers tell. Waits
        until `pending` of them are under way, the last ones. Raises DisagreementError on a rank
        whose mark was not the others'."""
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
        """Collective: raise StopRequestedError if a stop is agreed; otherwise ask again."""
        if self.settle():
            raise StopRequestedError
        self.begin(mark)
