"""Passes over whole weights: bit for bit what torch computes, but faster on the CPU.

torch converts a bool mask in a pass of its own before it multiplies or counts; numpy needs none. numpy runs on one thread, so where
torch has more it multiplies itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .sharding import is_sharded, whole

#: The dtypes of weights that numpy supports.
_OF_NUMPY = (torch.float16, torch.float32, torch.float64, torch.bool)


@torch.no_grad()
def keep_(tensor: Tensor, kept: Tensor) -> None:
    """`tensor.mul_(kept)` for a bool mask whose shape broadcasts."""
    if is_sharded(tensor):
        tensor.mul_(kept)
    elif kept.shape[-1:] != tensor.shape[-1:]:  # a small mask, converted in no time
        tensor.mul_(kept.to(tensor.dtype))
    elif _on_one_thread(tensor):
        values = tensor.detach().numpy()
        with np.errstate(invalid="ignore"):  # torch has no word on ∞ · 0 either
            np.multiply(values, kept.numpy(), out=values)
        increment_version(tensor)  # so that code that keeps a copy of a weight notices
    else:
        tensor.mul_(kept.view(torch.uint8))


def _on_one_thread(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and torch.get_num_threads() == 1


@torch.no_grad()
def count_nonzero(tensor: Tensor) -> int:
    """The number of nonzero elements, of a sharded tensor over all ranks."""
    if is_sharded(tensor) or tensor.device.type != "cpu" or tensor.dtype not in _OF_NUMPY:
        return int(whole(torch.count_nonzero(tensor)))
    values = tensor.detach().numpy()
    return int(np.count_nonzero(values if values.dtype == np.bool_ else values != 0))
