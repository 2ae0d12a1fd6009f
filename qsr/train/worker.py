"""A worker: a replica of the model with its own optimizer, loss scale and BatchNorm statistics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsr.config.schema import Config
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE
from qsr.sync.flat import FlatModule
from qsr.train.compiling import compile_network
from qsr.train.models import initial_model
from qsr.train.optim import build_optimizer
from qsr.train.precision import LossScale, Precision


class Worker:
    """Worker `index` of the run's K workers, or this rank's part of it."""

    def __init__(
        self,
        index: int,
        model: FlatModule,
        optimizer: torch.optim.Optimizer,
        scaler: LossScale,
        shard: int | None = None,
    ) -> None:
        """`shard`: which of the run's shards of samples it trains on; None: that of its index."""
        self.index = index
        self.shard = index if shard is None else shard
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        model.module.train()

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name; equal on all workers after an average."""
        return {f"parameters/{name}": p for name, p in self.model.module.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's states, named by parameter and key."""
        return {
            f"optimizer/{name}/{key}": value
            for name, parameter in self.model.module.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the worker: parameters, optimizer states, BatchNorm statistics."""
        return {**self._targets(), **self.optimizer_state()}

    def values(self) -> dict[str, Any]:
        """The rest of the worker's state, as values for JSON."""
        return {"scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `values` returned.

        Raises ValueError if names or shapes differ from this worker's.
        """
        targets = self._targets()
        stored = {name for name in tensors if not name.startswith("optimizer/")}
        if stored != targets.keys():
            odd = sorted(stored ^ targets.keys())
            raise ValueError(f"the checkpoint holds a different model: only one has {odd[0]}")
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise ValueError(
                    f"the checkpoint holds a different model: the shape of {name} differs"
                )
            target.copy_(tensors[name])
        self._load_optimizer(tensors)
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])

    def _targets(self) -> dict[str, Tensor]:
        buffers = {f"buffers/{name}": b for name, b in _persistent_buffers(self.model.module)}
        return {**self.parameters(), **buffers}

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state: dict[nn.Parameter, dict[str, Tensor]] = {}
        parameters = dict(self.model.module.named_parameters())
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                parameter_name, _, key = name.removeprefix("optimizer/").rpartition("/")
                parameter = parameters[parameter_name]
                # in the parameter's memory format, which fused kernels assume
                like = parameter if tensor.shape == parameter.shape else tensor
                state.setdefault(parameter, {})[key] = torch.empty_like(
                    like, dtype=tensor.dtype, device="cpu"
                ).copy_(tensor)
        layout = self.optimizer.state_dict()
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        layout["state"] = {i: state[p] for i, p in enumerate(ordered) if p in state}
        self.optimizer.load_state_dict(layout)


def make_workers(config: Config, num_classes: int, communicator: Communicator) -> list[Worker]:
    """The workers of this rank, all with the same initial weights."""
    device = communicator.device
    precision = Precision(config.precision, device, config.fp16_overflow == "repeat")
    fused = device.type == "cuda" or precision.name == "fp16"
    workers = []
    place = communicator.topology
    for index, shard in zip(place.workers, place.shards, strict=True):
        model = initial_model(config, num_classes, device)
        flat = FlatModule(model, extra=FINGERPRINT_SIZE)
        compile_network(model, config.compile)
        optimizer = build_optimizer(config.optimizer, model.parameters(), fused=fused)
        workers.append(Worker(index, flat, optimizer, precision.scaler(), shard))
    return workers


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]
