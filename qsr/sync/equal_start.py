"""The check that all workers begin with the same weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from qsr.errors import TrainingError
from qsr.sync.communicator import Communicator


def check_equal_start(
    communicator: Communicator, replicas: Iterable[Iterable[Tensor]], fix: str
) -> None:
    """Collective: raise TrainingError unless all workers have the same weights; after an average a
    difference would no longer show. `replicas`: the tensors of each of this rank's workers; `fix`:
    what the message tells the user to do."""
    own = {_digest(tensors) for tensors in replicas}
    everywhere = communicator.gather_texts(" ".join(sorted(own)))
    if len({digest for text in everywhere for digest in text.split()}) > 1:
        raise TrainingError(f"the workers' initial weights differ: {fix}")


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
