"""Masks: hold existing zeros, and count true zeros.

Which units a rule keeps is held unit by unit and applied by [`UnitGroup.apply`]; a mask, a bool tensor of a parameter's shape, True
where the weight is kept, is needed only for zeros that follow no pattern.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .sharding import whole
from .targets import Target, Weight


@torch.no_grad()
def apply_masks(targets: Mapping[str, Target], masks: Mapping[str, Tensor], gradients: bool = False) -> None:
    """Zero the masked elements of the weights and biases, or of their gradients, in place."""
    for name, mask in masks.items():
        targets[name].mask(mask, lambda tensor: tensor, adapted=True, gradients=gradients)


def count_zeros(counted: Iterable[Target | Weight]) -> tuple[int, int]:
    """`(zeros, elements)` over weights and biases, counted from the values; under LoRA those of the merged weight."""
    zeros = elements = 0
    for value in (item.value() for item in counted):
        elements += value.numel()
        zeros += value.numel() - int(whole(torch.count_nonzero(value)))
    return zeros, elements
