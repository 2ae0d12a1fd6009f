"""Who sees which sample."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsr.core.sampling import Sampler, epoch_order
from qsr.core.seeds import seed_for


def epoch_of(sampler: Sampler, epoch: int) -> list[list[int]]:
    """The samples of each worker in an epoch."""
    first = epoch * sampler.steps_per_epoch
    steps = range(first, first + sampler.steps_per_epoch)
    return [
        [i for step in steps for i in sampler.indices(step, worker)]
        for worker in range(sampler.num_shards)
    ]


@settings(max_examples=60)
@given(
    workers=st.integers(1, 6),
    local=st.integers(1, 7),
    steps=st.integers(1, 5),
    left_over=st.integers(0, 41),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_is_one_permutation_dealt_out_once(
    workers: int, local: int, steps: int, left_over: int, seed: int
) -> None:
    batch = workers * local
    num_samples = batch * steps + left_over % batch
    sampler = Sampler(num_samples, batch, workers, seed)
    assert sampler.steps_per_epoch == steps
    dealt = epoch_of(sampler, epoch=2)
    assert {len(samples) for samples in dealt} == {steps * local}
    seen = [i for samples in dealt for i in samples]
    assert len(set(seen)) == len(seen) == steps * batch  # disjoint, without replacement
    assert set(seen) <= set(range(num_samples))


def test_every_epoch_is_new_and_leaves_out_others() -> None:
    sampler = Sampler(103, 8, 4, seed=1)
    epochs = [epoch_of(sampler, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    left_out = [set(range(103)) - {i for s in dealt for i in s} for dealt in epochs]
    assert len(left_out[0]) == 7
    assert left_out[0] != left_out[1]


def test_the_global_batch_does_not_depend_on_the_number_of_workers() -> None:
    one, four = Sampler(100, 12, 1, seed=3), Sampler(100, 12, 4, seed=3)
    for step in range(20):
        assert one.indices(step, 0) == [i for w in range(4) for i in four.indices(step, w)]


def test_order_is_pinned() -> None:
    """A Python whose shuffle differs would silently train on another order."""
    assert epoch_order(10, seed=1, epoch=0).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [1, 8, 7, 9, 6, 0, 4, 2, 5, 3]


def test_seeds_are_independent_streams() -> None:
    seeds = [
        seed_for(0, "augment", worker=0, step=0),
        seed_for(0, "augment", worker=0, step=1),
        seed_for(0, "augment", worker=1, step=0),
        seed_for(1, "augment", worker=0, step=0),
        seed_for(0, "mixup", worker=0, step=0),
    ]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "a", x=1, y=2) == seed_for(0, "a", y=2, x=1)
    assert seed_for(1, "augment", worker=3, step=7) == GOLDEN_SEED


GOLDEN_SEED = 7_299_339_228_647_506_867


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, 3, 0), "does not divide"),
        ((5, 10, 2, 0), "exceeds"),
        ((5, 0, 1, 0), "global_batch"),
        ((5, 1, 0, 0), "num_shards"),
    ],
)
def test_refuses(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def test_refuses_a_worker_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="shard 4"):
        Sampler(100, 8, 4, 0).indices(0, 4)
