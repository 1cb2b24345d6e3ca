"""Floating point operations of a forward pass: of the whole model, and of each block."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..model.blocks import Block

#: What multiplies weights; anything else in an attention block multiplies activations.
_BY_WEIGHTS = frozenset({"mm", "addmm", "convolution", "linear"})


def _attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of scores and of their product with the values; two for a multiplication and an addition."""
    *heads, length, width = query
    return 4 * torch.Size(heads).numel() * length * key[-2] * width


@torch.no_grad()
def count_flops(model: nn.Module, inputs: Mapping[str, Tensor], blocks: Iterable[Block] = ()) -> tuple[float, dict[str, float]]:
    """The operations of one forward pass, counted while it runs; matrix products, convolutions and attention.

    Args:
        model: the model.
        inputs: what its forward takes.
        blocks: blocks of the model.

    Returns:
        The total, and block name → what goes with its units: its projections and, in attention, the products of activations.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows those of GPUs
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention}) as counter:
        model(**inputs)
    counts = {
        name.partition(".")[2]: {str(op).removeprefix("aten."): number for op, number in ops.items()}
        for name, ops in counter.get_flop_counts().items()
    }
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for block in blocks:
        parts = {names[part.layer] for part in block.projections}
        whole = posixpath.commonpath([name.replace(".", "/") for name in parts]).replace("/", ".")
        products = (number for op, number in counts.get(whole, {}).items() if op not in _BY_WEIGHTS)
        by_weights = sum(sum(counts.get(name, {}).values()) for name in parts)
        found[block.name] = float(by_weights + (sum(products) if block.kind == "attention" else 0))
    return float(counter.get_total_flops()), found
