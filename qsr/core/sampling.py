"""Which training samples a worker sees at a step: a pure function of the seed.

Every epoch is one permutation of the data, divided among all workers without replacement:
floor(N / B) steps of B samples; the remaining samples are left out, different ones in each epoch.
Nothing here depends on processes, so K workers see the same samples however they are spread over
ranks.
"""

import random
from array import array
from dataclasses import dataclass
from functools import lru_cache

from qsr.core.seeds import seed_for


@dataclass(frozen=True)
class Sampler:
    """Deals `num_samples` samples to `num_workers` workers, `global_batch` per step.

    Raises ValueError if the batch is not divisible by the workers or exceeds the data.
    """

    num_samples: int
    global_batch: int
    num_workers: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.global_batch < 1 or self.global_batch % self.num_workers:
            raise ValueError(
                f"global_batch {self.global_batch} does not divide by {self.num_workers} workers"
            )
        if self.global_batch > self.num_samples:
            raise ValueError(
                f"global_batch {self.global_batch} exceeds the {self.num_samples} samples"
            )

    @property
    def local_batch(self) -> int:
        """Samples per worker and step."""
        return self.global_batch // self.num_workers

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / B)."""
        return self.num_samples // self.global_batch

    def indices(self, step: int, worker: int) -> list[int]:
        """The `local_batch` sample indices of `worker` at the 0-based `step` of the run."""
        if not 0 <= worker < self.num_workers:
            raise ValueError(f"worker {worker} lies outside 0..{self.num_workers - 1}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + worker * self.local_batch
        order = epoch_order(self.num_samples, self.seed, epoch)
        return order[start : start + self.local_batch].tolist()


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> "array[int]":
    """A permutation of 0..num_samples - 1 for a run's seed and the epoch. Two are cached, because a
    loader reads ahead into the next epoch and shuffling 1.3 million indices takes 0.5 s."""
    order = array("q", range(num_samples))
    random.Random(seed_for(seed, "order", epoch=epoch)).shuffle(order)
    return order
