"""The number format of the forward and backward pass."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

SETTLED_STEPS = 100
"""A loss scale that has held for so many steps counts as found. The released code doubles its own
as often."""

GROWTH_STEPS = 2000
"""Steps after which a scale that has held is doubled: torch's default."""

MOST_REPEATS = 50
"""Of one step's batch, as in the released code: scales down by 2^50."""


class LossScale(torch.amp.GradScaler):
    """The dynamic loss scale of one worker, which can ask for a batch to be repeated.

    With `repeat`, and while the right scale is still being looked for, the host reads after each
    backward pass whether the gradients overflowed, so that the caller can repeat the batch at half
    the scale: no update is lost (the released code does so in every step). A scale is looked for
    at the start and after each doubling, until it has held for SETTLED_STEPS. Then the host does
    not wait any more, and an overflow skips the update on the device, as GradScaler does.
    """

    def __init__(
        self, device: str, *, enabled: bool = True, repeat: bool = True, init_scale: float = 65536.0
    ) -> None:
        # with `repeat` the host doubles the scale, so that it knows when to look
        growth_interval = 2**31 - 1 if repeat else GROWTH_STEPS
        super().__init__(
            device, init_scale=init_scale, growth_interval=growth_interval, enabled=enabled
        )
        self._repeats = repeat and enabled
        self._held = 0
        """Steps since the scale changed, as far as the host knows."""
        self._repeated = 0
        """Times that the batch of this step was repeated."""

    @property
    def is_searching(self) -> bool:
        """Whether the right scale is still being looked for, so that batches may be repeated."""
        return self._repeats and self._held < SETTLED_STEPS

    def must_repeat(self, optimizer: torch.optim.Optimizer) -> bool:
        """After `unscale_`: whether the batch is to be repeated, at the scale that is set now. The
        host waits for the device only while the scale is being looked for."""
        if not self.is_searching:
            return False
        found = self._found_inf_per_device(optimizer)
        if not any(flag.item() for flag in found.values()):
            return False
        if self._repeated == MOST_REPEATS:  # no scale would help; the monitor will say so
            self._held = SETTLED_STEPS
            return False
        self._held = 0
        self._repeated += 1
        super().update()  # halves the scale, and forgets these gradients
        return True

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """After the optimizer's step."""
        super().update(new_scale)
        self._repeated = 0
        if not self._repeats:
            return
        self._held += 1
        if self._held == GROWTH_STEPS:
            super().update(2.0 * self.get_scale())
            self._held = 0

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**super().state_dict(), "held_steps": self._held} if self.is_enabled() else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._held = state_dict["held_steps"]


@dataclass(frozen=True)
class Precision:
    """fp32, or autocast to bf16 or fp16 with parameters in fp32; fp16 needs a loss scale."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device
    repeat_overflows: bool = True
    """Whether an fp16 batch whose gradients overflow is repeated (see `LossScale`)."""

    def autocast(self) -> AbstractContextManager[object]:
        """Context of every forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.name])

    def scaler(self) -> LossScale:
        """A dynamic loss scale; it does nothing unless the precision is fp16."""
        return LossScale(
            self.device.type, enabled=self.name == "fp16", repeat=self.repeat_overflows
        )
