"""The number format of the forward and backward pass."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

SETTLED_STEPS = 100
"""Steps without overflow after which a loss scale counts as found. The released code doubles its
scale at this interval."""

GROWTH_STEPS = 2000
"""Steps without overflow after which the scale is doubled: torch's default."""

MOST_REPEATS = 50
"""Most repeats of one step's batch, as in the released code: scales down by 2^50."""


class LossScale(torch.amp.GradScaler):
    """The dynamic loss scale of one worker, which can ask for a batch to be repeated.

    With `repeat`, and while it searches for the right scale, the host checks after each backward
    pass whether the gradients overflowed, so that the caller can repeat the batch at half the scale
    and no update is lost (the released code does so in every step). The search starts at the first
    step and after each doubling, and ends after SETTLED_STEPS without overflow. From then on the
    host does not wait, and an overflow skips the update on the device, as in GradScaler.
    """

    def __init__(
        self, device: str, *, enabled: bool = True, repeat: bool = True, init_scale: float = 65536.0
    ) -> None:
        # with `repeat` the host doubles the scale, so that it knows when a search starts
        growth_interval = 2**31 - 1 if repeat else GROWTH_STEPS
        super().__init__(
            device, init_scale=init_scale, growth_interval=growth_interval, enabled=enabled
        )
        self._repeats = repeat and enabled
        self._held = 0
        """Steps since the host last saw the scale change."""
        self._repeated = 0
        """Repeats of this step's batch so far."""

    @property
    def is_searching(self) -> bool:
        """Whether the right scale is still being searched for, so that batches may be repeated."""
        return self._repeats and self._held < SETTLED_STEPS

    def must_repeat(self, optimizer: torch.optim.Optimizer) -> bool:
        """After `unscale_`: whether to repeat the batch; the scale has then been halved. The host
        waits for the device only during a search."""
        if not self.is_searching:
            return False
        found = self._found_inf_per_device(optimizer)
        if not any(flag.item() for flag in found.values()):
            return False
        if self._repeated == MOST_REPEATS:  # no scale would help; the monitor reports it
            self._held = SETTLED_STEPS
            return False
        self._held = 0
        self._repeated += 1
        super().update()  # halves the scale and forgets this overflow
        return True

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Call after the optimizer's step."""
        super().update(new_scale)
        self._repeated = 0
        if not self._repeats:
            return
        self._held += 1
        if self._held == GROWTH_STEPS:
            super().update(2.0 * self.get_scale())
            self._held = 0

    def state_dict(self) -> dict[str, Any]:
        """The state, as values for JSON; empty if disabled."""
        return {**super().state_dict(), "held_steps": self._held} if self.is_enabled() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._held = state_dict["held_steps"]


@dataclass(frozen=True)
class Precision:
    """fp32, or autocast to bf16 or fp16 with fp32 parameters; fp16 needs a loss scale."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device
    repeat_overflows: bool = True
    """Whether an fp16 batch whose gradients overflow is repeated (see `LossScale`)."""

    def autocast(self) -> AbstractContextManager[object]:
        """Context for a forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.name])

    def casts_kept(self) -> AbstractContextManager[object]:
        """Context for all passes of a step with the same weights: autocast then casts each weight
        once and not in every forward pass. It forgets the casts at the end of the outermost
        context, so this one, which casts nothing itself, makes those of the passes inner ones."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def scaler(self) -> LossScale:
        """A dynamic loss scale; it does nothing unless the precision is fp16."""
        return LossScale(
            self.device.type, enabled=self.name == "fp16", repeat=self.repeat_overflows
        )
