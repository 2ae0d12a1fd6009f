"""Which training samples a worker sees at a step: a pure function of the seed.

Every epoch is one permutation of the data, divided among all workers without replacement:
floor(N / B) steps of B samples; the remaining samples are left out, different ones in each epoch.
A step's samples are dealt in shards: one for each worker or, if several ranks make one worker, one
for each of its ranks. Nothing here depends on processes, so K workers see the same samples however
they are spread over ranks.
"""

import random
from array import array
from dataclasses import dataclass
from functools import lru_cache

from qsr.core.seeds import seed_for


@dataclass(frozen=True)
class Sampler:
    """Deals `num_samples` samples in `num_shards` shards, `global_batch` per step.

    Raises ValueError if the batch is not divisible by the shards or exceeds the data.
    """

    num_samples: int
    global_batch: int
    num_shards: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"num_shards must be at least 1, got {self.num_shards}")
        if self.global_batch < 1 or self.global_batch % self.num_shards:
            raise ValueError(
                f"global_batch {self.global_batch} does not divide by {self.num_shards} shards"
            )
        if self.global_batch > self.num_samples:
            raise ValueError(
                f"global_batch {self.global_batch} exceeds the {self.num_samples} samples"
            )

    @property
    def shard_size(self) -> int:
        """Samples per shard and step."""
        return self.global_batch // self.num_shards

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / B)."""
        return self.num_samples // self.global_batch

    def indices(self, step: int, shard: int) -> list[int]:
        """The `shard_size` sample indices of a shard at the 0-based `step` of the run."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} lies outside 0..{self.num_shards - 1}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + shard * self.shard_size
        order = epoch_order(self.num_samples, self.seed, epoch)
        return order[start : start + self.shard_size].tolist()


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> "array[int]":
    """A permutation of 0..num_samples - 1 for a run's seed and the epoch. Two are cached, because a
    loader reads ahead into the next epoch and shuffling 1.3 million indices takes 0.5 s."""
    order = array("q", range(num_samples))
    random.Random(seed_for(seed, "order", epoch=epoch)).shuffle(order)
    return order
