"""Which ranks are missing, asked where the ranks met, because the network between them has failed.

Two questions, since two things happen. A rank that hangs lives: what it does not do is to wait in
the collective in which the others are. A rank that is gone does not even answer from a thread; the
others learn of it one after the other, each when its own neighbours go.
"""

import threading
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_PATIENCE_SECONDS = 2.0
"""For the other ranks' sign."""
_LISTEN_SECONDS = 0.5
"""How often a rank looks whether it is asked for a sign of life."""


class RollCall:
    """Of rank `rank` of `ranks`, which all have one, on the same `store`."""

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store = PrefixStore("roll-call", store)
        self._rank, self._ranks = rank, ranks
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def not_waiting(self) -> list[int]:
        """The ranks that do not call this too within two seconds."""
        return self._missing("waiting", lambda: None)

    def gone(self) -> list[int]:
        """The ranks whose process gives no sign of life within two seconds."""
        return self._missing("alive", lambda: self._store.set("asked", ""))

    def close(self) -> None:
        """Give no more signs."""
        self._over.set()
        self._listener.join(2 * _PATIENCE_SECONDS)

    def _listen(self) -> None:
        try:
            while not self._over.wait(_LISTEN_SECONDS):
                if self._store.check(["asked"]):
                    self._store.set(f"alive/{self._rank}", "")
                    return
        except RuntimeError:  # the process that has the store is gone
            return

    def _missing(self, sign: str, ask: Callable[[], None]) -> list[int]:
        present: set[int] = set()

        def call() -> None:
            try:
                self._store.set(f"{sign}/{self._rank}", "")
                ask()
                while len(present) < self._ranks:
                    others = (rank for rank in range(self._ranks) if rank not in present)
                    present.update([r for r in others if self._store.check([f"{sign}/{r}"])])
                    time.sleep(0.05)
            except RuntimeError:  # as above: whoever began the ranks, at rank 0
                present.update(range(1, self._ranks))

        # in a thread, because nothing bounds the time that a store takes whose process hangs
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        caller.join(_PATIENCE_SECONDS)
        return [rank for rank in range(self._ranks) if rank not in present | {self._rank}]
