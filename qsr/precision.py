"""The number format of the forward and backward pass."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """fp32, or autocast to bf16 or fp16 with parameters in fp32; fp16 needs a loss scale."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Context of every forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """A dynamic loss scale; it does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
