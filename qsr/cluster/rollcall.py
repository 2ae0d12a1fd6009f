"""Finds missing ranks through the rendezvous store, after a collective has failed.

There are two cases. A rank that hangs is alive, but does not wait in the collective that the others
are in. A rank that is gone does not answer even from a thread; the others notice it one after the
other, each when its own neighbours fail.
"""

import threading
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_PATIENCE_SECONDS = 2.0
"""How long to wait for the other ranks to answer."""
_LISTEN_SECONDS = 0.5
"""How often a rank checks whether it is asked if it is alive."""


class RollCall:
    """The roll call of rank `rank` of `ranks`; every rank has one, on the same `store`."""

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store = PrefixStore("roll-call", store)
        self._rank, self._ranks = rank, ranks
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def not_waiting(self) -> list[int]:
        """The ranks that do not call this method as well within two seconds."""
        return self._missing("waiting", lambda: None)

    def gone(self) -> list[int]:
        """The ranks whose process does not answer within two seconds."""
        return self._missing("alive", lambda: self._store.set("asked", ""))

    def close(self) -> None:
        """Stop answering."""
        self._over.set()
        self._listener.join(2 * _PATIENCE_SECONDS)

    def _listen(self) -> None:
        try:
            while not self._over.wait(_LISTEN_SECONDS):
                if self._store.check(["asked"]):
                    self._store.set(f"alive/{self._rank}", "")
                    return
        except RuntimeError:  # the process that hosts the store is gone
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
            except RuntimeError:  # the store is gone, and with it rank 0 or its launcher
                present.update(range(1, self._ranks))

        # in a thread, because calls to a store whose process hangs have no time limit
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        caller.join(_PATIENCE_SECONDS)
        return [rank for rank in range(self._ranks) if rank not in present | {self._rank}]
