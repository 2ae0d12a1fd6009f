"""Tensors that share one flat buffer per dtype, so that a collective needs no packing copies."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT_BYTES = 64
"""Alignment of the tensors, the same as torch's allocations have: vectorized kernels are slower on
other addresses, or are not used."""


class FlatBuffers:
    """One contiguous buffer per dtype that holds `tensors` (on one device) one after another, with
    zeros as padding for alignment.

    `views[i]` has the shape, memory format (channels_last too) and values of `tensors[i]` and is a
    view of the buffer of its dtype. `tail` is `extra` more float32 elements at the end of the
    float32 buffer, which are communicated with the tensors. `bytes` is the size of the tensors,
    without padding and tail.
    """

    def __init__(self, tensors: Sequence[Tensor], extra: int = 0) -> None:
        sizes: dict[torch.dtype, int] = {}
        offsets = []
        for tensor in tensors:
            multiple = _ALIGNMENT_BYTES // tensor.element_size()
            offset = -(-sizes.get(tensor.dtype, 0) // multiple) * multiple
            offsets.append(offset)
            sizes[tensor.dtype] = offset + tensor.numel()
        if extra:
            sizes[torch.float32] = sizes.get(torch.float32, 0) + extra
        device = tensors[0].device
        self.buffers = {
            dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        self.views = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            # empty_like keeps the dimension order of a dense tensor; others become contiguous
            strides = torch.empty_like(tensor, device="meta").stride()
            view = self.buffers[tensor.dtype].as_strided(tensor.shape, strides, offset)
            view.copy_(tensor.detach())
            self.views.append(view)
        self.bytes = sum(view.numel() * view.element_size() for view in self.views)
        self.tail = self.buffers[torch.float32][-extra:] if extra else torch.empty(0)


class FlatModule:
    """A module whose parameters are views of flat buffers.

    After `flatten_gradients`, `gradients` holds its gradients in flat buffers too.
    """

    def __init__(self, module: nn.Module, extra: int = 0) -> None:
        self.module = module
        self.gradients: FlatBuffers | None = None
        parameters = list(module.parameters())
        self.flat = FlatBuffers(parameters, extra)
        for parameter, view in zip(parameters, self.flat.views, strict=True):
            parameter.data = view

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, in the order of `flat.views`."""
        return dict(self.module.named_parameters())

    def flatten_gradients(self) -> None:
        """Keep the gradients in flat buffers from now on, so that averages need no packing."""
        if self.gradients is not None:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.gradients = FlatBuffers([torch.zeros_like(p) for p in parameters])
        for parameter, view in zip(parameters, self.gradients.views, strict=True):
            parameter.grad = view

    def zero_gradients(self) -> None:
        """Clear the gradients of the last step."""
        if self.gradients is None:
            self.module.zero_grad(set_to_none=True)
        else:
            for buffer in self.gradients.buffers.values():
                buffer.zero_()
