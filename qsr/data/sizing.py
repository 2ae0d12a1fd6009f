"""How many threads load, and how far ahead, where the settings leave it open."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # reading a model file does not need the settings' libraries
    from qsr.config.schema import DataConfig

MOST_THREADS = 32
"""More feed no GPU faster: handing out the work takes the interpreter's time."""


class LoaderSize(NamedTuple):
    """How much a loader does at a time."""

    threads: int
    prefetch: int
    """Batches in flight while the caller uses the last one."""


def loader_size(config: "DataConfig", cores: int, batch_size: int) -> LoaderSize:
    """The size that the settings ask for, or else that suits a rank with so many CPU cores."""
    threads, prefetch = config.loader_threads, config.prefetch_batches
    if threads is None:
        threads = default_threads(cores)
    if prefetch is None:
        prefetch = default_prefetch(threads, batch_size)
    return LoaderSize(max(1, threads), prefetch)


def default_threads(cores: int) -> int:
    """All cores but one, which drives the training."""
    return max(1, min(cores - 1, MOST_THREADS))


def default_prefetch(threads: int, batch_size: int) -> int:
    """Two batches, or as many small ones as give each thread four images. So no more than two
    batches, or about four images a thread, lie in memory ahead of their use."""
    return max(2, -(-4 * threads // batch_size))
