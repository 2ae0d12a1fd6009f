"""A loader that keeps training waiting, and says for how long."""

import time
from collections.abc import Iterable, Iterator

from qsr.data import Batch, Loader, Request
from qsr.train.trainer import TrainingData
from tests.support import Rig

NAP_SECONDS = 0.02


class Sleeper:
    """Sleeps before each batch of another loader, and counts its own time by the clock."""

    def __init__(self, loader: Loader, nap_seconds: float = NAP_SECONDS) -> None:
        self.loader, self.nap_seconds = loader, nap_seconds
        self.seconds = 0.0

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for batch in self.loader.batches(requests):
            started = time.perf_counter()
            time.sleep(self.nap_seconds)
            self.seconds += time.perf_counter() - started
            yield batch

    def close(self) -> None:
        self.loader.close()


def put_to_sleep(rig: Rig, nap_seconds: float = NAP_SECONDS) -> Sleeper:
    sleeper = Sleeper(rig.loader, nap_seconds)
    rig.trainer._data = TrainingData(sleeper, rig.trainer._data.sampler)
    return sleeper
