"""Averages of the model over time, which change nothing in training.

They are of the workers' mean: after every step of data parallel training, and else after every
round, as the next one starts from it. Every rank computes them from its own first worker, since all
workers are equal then.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from qsr.config.schema import EmaConfig
from qsr.core.plan import Round
from qsr.sync.flat import FlatBuffers, FlatModule
from qsr.train.evaluation import Evaluation, Evaluator

_PREFIX = "weight_average/"
"""Prefix of the averages' tensors in a checkpoint."""
_STEPS = "weight_average_steps"
"""Name of the steps that each average has covered, in a checkpoint."""


class WeightAverages:
    """The averages that the settings ask for, of a run of `total_steps`; none takes no memory.

    `ema` begins as the first model that it is given; a later one, after H more steps, gets a share
    of 1 - decay^H. In `uniform` each model counts as often as its round has steps in the last
    part of the run.
    """

    def __init__(self, replica: FlatModule, settings: EmaConfig, total_steps: int) -> None:
        self.evaluations: dict[str, Evaluation] = {}
        """Of the last evaluation; averages that have not begun are absent, here and below."""
        self.models: dict[str, dict[str, Tensor]] = {}
        """State dicts of the averages that `evaluate` kept, in host memory."""
        self._replica = replica
        self._decay = settings.decay
        last_part = round(total_steps * (settings.uniform_fraction or 0.0))
        self._uniform_from = total_steps - max(1, last_part)
        self._flat = {name: FlatBuffers(replica.flat.views) for name in settings.names}
        self._steps = dict.fromkeys(settings.names, 0)

    def update(self, round_: Round) -> None:
        """Call at the end of every round, when all workers are equal. The host does not wait."""
        for name, flat in self._flat.items():
            steps, before = self._steps_of(name, round_), self._steps[name]
            if not steps:
                continue
            if not before:
                share = 1.0
            elif name == "ema":
                assert self._decay is not None
                share = 1.0 - self._decay**steps
            else:
                share = steps / (before + steps)
            for dtype, average in flat.buffers.items():
                # without the tail that replicas have for communication
                average.lerp_(self._replica.flat.buffers[dtype][: average.numel()], share)
            self._steps[name] = before + steps

    def _steps_of(self, name: str, round_: Round) -> int:
        """The round's steps that an average covers."""
        first = self._uniform_from if name == "uniform" else 0
        return max(0, round_.end - max(round_.start, first))

    def evaluate(
        self, evaluator: Evaluator, step: int, between: Callable[[], None], *, keep: bool
    ) -> None:
        """Collective: validate each average after `step` steps; `between` as in
        `Evaluator.evaluate`. `keep`: also keep the models, with their BatchNorm statistics."""
        for name, flat in self._begun().items():
            self.evaluations[name] = evaluator.evaluate(
                [flat], step, averaged=True, between=between
            )
            if keep:
                state = evaluator.model.state_dict()
                self.models[name] = {key: t.to("cpu", copy=True) for key, t in state.items()}

    def measured(self, loss: str = "loss") -> dict[str, float]:
        """The last evaluation by names such as ema_top1; `loss`: what the loss is called."""
        found: dict[str, float] = {}
        for name, result in self.evaluations.items():
            found |= {f"{name}_{loss}": result.loss, f"{name}_top1": result.top1}
            if result.top5 is not None:
                found[f"{name}_top5"] = result.top5
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, equal on all workers."""
        return {
            f"{_PREFIX}{name}/{parameter}": view
            for name, flat in self._begun().items()
            for parameter, view in zip(self._replica.parameters(), flat.views, strict=True)
        }

    def values(self) -> dict[str, Any]:
        """The rest of it, as values for JSON."""
        return {_STEPS: self._steps} if self._steps else {}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `values` returned, among others."""
        self._steps |= values.get(_STEPS, {})
        for name, view in self.tensors().items():
            view.copy_(tensors[name])

    @staticmethod
    def is_state(name: str) -> bool:
        """Whether a checkpoint's tensor of this name comes from `tensors`."""
        return name.startswith(_PREFIX)

    def _begun(self) -> dict[str, FlatBuffers]:
        return {name: flat for name, flat in self._flat.items() if self._steps[name]}
