"""The interface of loaders: requests in, batches out, in the same order."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Request(NamedTuple):
    """One batch to load."""

    indices: Sequence[int]
    """Positions in the data set's file list, one per sample; at least one."""
    seed: int
    """Seed of all augmentations of this batch (0 <= seed < 2**64). Validation ignores it."""


class Batch(NamedTuple):
    """One loaded batch, on the loader's device."""

    images: Tensor
    """float32 [b, 3, size, size], normalised."""
    labels: Tensor
    """int64 [b], class indices."""


class Loader(Protocol):
    """Loads batches on request; it has no random state.

    A batch depends only on its request, not on earlier requests, the number of threads or
    restarts of the process. Resuming a run therefore needs no loader state, only the remaining
    requests.
    """

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch per request, in order.

        `requests` may be infinite: it is read only as far ahead as the loader prefetches.
        The number of indices may vary between requests, up to the loader's batch size.
        A new call ends the stream of the previous one, which need not be exhausted.

        Raises:
            DataError: a file cannot be read or decoded; names the file and its index. The loader
                must then be closed and replaced.
            ValueError: a request is empty or larger than the loader's batch size, or an index
                lies outside the data set.
        """
        ...

    def close(self) -> None:
        """Release threads and buffers. Closing twice is harmless."""
        ...


def check_request(request: Request, batch_size: int, samples: int) -> None:
    """Raise ValueError unless `request` has 1 to `batch_size` indices below `samples`."""
    if not 1 <= len(request.indices) <= batch_size:
        raise ValueError(
            f"a request must have 1 to {batch_size} indices, not {len(request.indices)}"
        )
    if min(request.indices) < 0 or max(request.indices) >= samples:
        raise ValueError(f"a request has an index outside 0 to {samples - 1}")
