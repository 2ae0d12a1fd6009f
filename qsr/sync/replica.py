"""The parameters of a worker whose training loop is not ours, and how they are averaged."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsr.errors import TrainingError
from qsr.sync.averaging import Averager, mean_tensors_
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers


class Replica(Protocol):
    """The trainable parameters of a worker's model."""

    @property
    def bytes(self) -> int:
        """Size of what an average sends, in bytes."""

    def tensors(self) -> list[Tensor]:
        """What an average replaces, in this process's memory."""

    def average_(self, mark: Fingerprint) -> None:
        """Collective: replace the parameters of every worker by their mean."""

    def check(self, model: nn.Module) -> None:
        """Raise TrainingError if the model's trainable parameters are no longer these, or have left
        the memory that is averaged."""


class FlatReplica:
    """Parameters that were moved into one buffer per dtype: an average needs no copies."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> None:
        self.flat = FlatBuffers(list(parameters.values()), FINGERPRINT_SIZE)
        self.averager = Averager(communicator)
        self._parameters = parameters
        for parameter, view in zip(parameters.values(), self.flat.views, strict=True):
            parameter.data = view

    @property
    def bytes(self) -> int:
        """Size of what an average sends, in bytes."""
        return self.flat.bytes

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters by name, in the order of `flat.views`."""
        return self._parameters

    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return list(self.flat.buffers.values())

    def average_(self, mark: Fingerprint) -> None:
        """Collective: replace the parameters of every worker by their mean."""
        self.averager.average_([self.flat], mark)

    def check(self, model: nn.Module) -> None:
        """Raise TrainingError if the parameters are others, or not in their buffers."""
        _check_same(self._parameters, model)
        for (name, parameter), view in zip(self._parameters.items(), self.flat.views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                raise TrainingError(
                    f"the parameter {name} was moved after LocalSGD was built: build LocalSGD "
                    f"after model.to() and load_state_dict(assign=True), or with flatten=False"
                )


class BucketReplica:
    """Parameters that stay where they are, such as the shards of FSDP2."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> None:
        self._parameters = parameters
        self._communicator = communicator

    @property
    def bytes(self) -> int:
        """Size of what an average sends, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The parameters, of a DTensor this process's shard."""
        return [local(parameter) for parameter in self._parameters.values()]

    def average_(self, mark: Fingerprint) -> None:
        """Collective: replace the parameters of every worker by their mean."""
        mean_tensors_(self._communicator, self.tensors())

    def check(self, model: nn.Module) -> None:
        """Raise TrainingError if the parameters are others; they may move."""
        _check_same(self._parameters, model)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    data = tensor.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; a tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_same(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    known = {id(parameter) for parameter in parameters.values()}
    now = trainable(model)
    if [id(p) for p in now.values()] == [id(p) for p in parameters.values()]:
        return
    new = next((name for name, p in now.items() if id(p) not in known), None)
    raise TrainingError(
        "a parameter that was trainable when LocalSGD was built is frozen or gone: build LocalSGD "
        "again for the parameters that are trained now"
        if new is None
        else f"the parameter {new} is new, or was frozen when LocalSGD was built: build LocalSGD "
        f"after the model is complete"
    )


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the values, to see whether workers start equal."""
    found = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def can_be_flat(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the parameters can be moved into flat buffers."""
    dense = all(
        not isinstance(p, DTensor) and p.layout == torch.strided for p in parameters.values()
    )
    return dense and len({p.device for p in parameters.values()}) == 1
