"""Carrying a plan out: what dead units added goes into biases, they and empty layers go, and the config says what is left."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model import spec_for
from ..model.families import carry
from ..model.lora import zeros_held
from .layers import remove_layers
from .plan import BlockPlan, CondensePlan
from .resize import Select, add_bias, keep_units
from .snapshot import return_memory


def cut(model: PreTrainedModel, plan: CondensePlan, select: Select = torch.index_select) -> None:
    """Remove from a model what its plan says, in place; its config becomes that of the smaller model.

    Args:
        model: the transformers model that the plan is of.
        plan: what goes.
        select: what takes slices of a parameter.
    """
    with zeros_held([adapter for block in plan.changed for adapter in block.adapters]):
        for block in plan.changed:
            fold(block)
            if block.dead.any():
                keep_units(block.block, block.kept, block.groups, own_heads=block.heads, select=select)
                return_memory()
    remove_layers(model, spec_for(model.config.model_type), plan.removed)
    model.config.hf_prune = plan.entry(getattr(model.config, "hf_prune", None))
    carry(model.config)


@torch.no_grad()
def fold(plan: BlockPlan) -> None:
    """Add the constant contribution of dead units to the output bias, in float32 at least."""
    if plan.shift.any():
        output = plan.block.output.layer
        add_bias(output)
        bias = output.bias
        shifted = (bias.to(plan.shift.dtype) + plan.shift).to(bias.dtype)
        output.bias = nn.Parameter(shifted, requires_grad=bias.requires_grad)
