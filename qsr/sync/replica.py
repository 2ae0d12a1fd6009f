"""The parameters of a worker whose training loop is not ours, and how they are averaged."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qsr.errors import TrainingError
from qsr.sync.averaging import Averager, mean_tensors_
from qsr.sync.communicator import Communicator
from qsr.sync.delayed import DelayedAverage
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers


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


class MoreToAverage:
    """Optimizer states and buffers that are averaged with the parameters."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        momentum: bool,
        second_moment: bool,
        buffers: bool,
    ) -> None:
        self._model, self._optimizer, self._buffers = model, optimizer, buffers
        # torch's names
        first = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
        self._keys = [first] * momentum + ["exp_avg_sq"] * second_moment

    def tensors(self) -> Iterator[Tensor]:
        """The tensors. Where a worker has no state for a parameter yet, zeros that nobody reads."""
        for parameter in trainable(self._model).values() if self._keys else ():
            state = self._optimizer.state[parameter]
            for key in self._keys:
                value = state.get(key)
                yield torch.zeros_like(local(parameter)) if value is None else local(value)
        if self._buffers:
            yield from (buffer for buffer in self._model.buffers() if buffer.is_floating_point())


def mean_gradients_(communicator: Communicator, parameters: Sequence[nn.Parameter]) -> int:
    """Collective: replace the gradients, in place, by their means over all workers; one that some
    workers lack counts as zeros there. Returns the bytes of the gradients."""
    have = torch.tensor([float(p.grad is not None) for p in parameters])
    anywhere = communicator.total(have.to(communicator.device)).tolist()
    used = [p for p, number in zip(parameters, anywhere, strict=True) if number]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [local(p.grad) for p in used if p.grad is not None]
    mean_tensors_(communicator, gradients)
    return sum(gradient.nbytes for gradient in gradients)


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


def make_replica(
    parameters: Mapping[str, nn.Parameter], communicator: Communicator, flatten: bool
) -> FlatReplica | BucketReplica:
    """The parameters in flat buffers if they can be moved there and `flatten` allows it."""
    dense = all(
        not isinstance(p, DTensor) and p.layout == torch.strided for p in parameters.values()
    )
    if flatten and dense and len({p.device for p in parameters.values()}) == 1:
        return FlatReplica(parameters, communicator)
    return BucketReplica(parameters, communicator)


def delayed_average(replica: FlatReplica | BucketReplica) -> DelayedAverage:
    """Averages of the replica that overlap with training. Raises ValueError."""
    if isinstance(replica, BucketReplica):
        raise ValueError("delay_steps needs parameters that can be moved (flatten=True)")
    return DelayedAverage(replica.averager, [replica])
