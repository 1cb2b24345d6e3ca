"""What could go: dead heads and neurons, read from the zeros in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import AttentionBlock, Block, FeedForwardBlock, Projection, find_blocks
from .resize import block_key, block_size, inputs_of, output_of, size_name


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What would go from one block.

    Attributes:
        block: the block.
        dead: which heads or neurons would go, `[units]`.
        constant: the value of each of the block's features, which the output projection reads, where it is the same whatever
            the input: true of every dead unit whose output columns are not zero, meaningless for living ones. `[features]`.
    """

    block: Block
    dead: Tensor
    constant: Tensor

    @property
    def kept(self) -> Tensor:
        """Indices of the heads or neurons that stay, ascending."""
        return (~self.dead).nonzero().flatten()

    @property
    def dead_features(self) -> Tensor:
        """Which of the block's features belong to dead units, `[features]`."""
        return self.dead.repeat_interleave(len(self.constant) // max(len(self.dead), 1))

    @property
    def parameters(self) -> int:
        """How many parameters would go."""
        rows = sum(matrix(part).shape[1] + (part.module.bias is not None) for part in inputs_of(self.block))
        return int(self.dead_features.sum()) * (rows + matrix(output_of(self.block)).shape[0])


@dataclass(frozen=True, eq=False)
class CondensePlan:
    """What [`condense`] would do to a model, block by block."""

    blocks: tuple[BlockPlan, ...]

    @property
    def changed(self) -> list[BlockPlan]:
        """The blocks that lose something."""
        return [plan for plan in self.blocks if plan.dead.any()]

    @property
    def parameters(self) -> int:
        """How many parameters would go."""
        return sum(plan.parameters for plan in self.blocks)

    def entry(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """The `config.hf_prune` of the model after this plan. `before`: its entry now; see `resize.py` for the format."""
        layers = {name: dict(parts) for name, parts in (before or {}).get("layers", {}).items()}
        for plan in self.changed:
            layers.setdefault(plan.block.layer, {})[block_key(plan.block)] = {size_name(plan.block): len(plan.kept)}
        return {"version": 1, "layers": layers}

    def to_dict(self) -> list[dict[str, Any]]:
        """One JSON object a block: `layer`, `block`, `unit`, how many it has (`before`) and keeps (`after`), `parameters` saved."""
        return [
            {
                "layer": plan.block.layer,
                "block": block_key(plan.block),
                "unit": "heads" if isinstance(plan.block, AttentionBlock) else "neurons",
                "before": block_size(plan.block),
                "after": len(plan.kept),
                "parameters": plan.parameters,
            }
            for plan in self.blocks
        ]

    def __str__(self) -> str:
        rows = [
            (f"{row['layer']}.{row['block']}", f"{row['after']} of {row['before']} {row['unit']}", f"-{row['parameters']:,}")
            for row in self.to_dict()
        ]
        rows.append(("total", "", f"-{self.parameters:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{name:<{widths[0]}}  {stays:>{widths[1]}}  {saved:>{widths[2]}}" for name, stays, saved in rows)


@torch.no_grad()
def condense_plan(model: nn.Module) -> CondensePlan:
    """What [`condense`] would remove from a model, without touching it.

    A head is dead when its columns of the output projection are all zero, or its value rows are (it then adds a constant, since
    attention weights sum to one); never because its queries or keys are: such a head still attends, evenly. A neuron is dead when
    its column of the down projection is zero, or its value is the same for every input.

    Raises:
        ValueError: the family has no architecture spec, or a projection is not a plain floating-point Linear or Conv1D in memory.
    """
    found = find_blocks(model)
    for block in found:
        for part in (*inputs_of(block), output_of(block)):
            _check_plain(part)
    return CondensePlan(tuple(_attention(block) if isinstance(block, AttentionBlock) else _ffn(block) for block in found))


def _attention(block: AttentionBlock) -> BlockPlan:
    constant = bias(block.value)
    silent = _zero_rows(block.value)
    unread = _zero_columns(block.output)
    heads = (block.num_heads, block.head_size)
    dead = unread.view(heads).all(1) | (_foldable(block, silent, constant).view(heads).all(1))
    return BlockPlan(block, dead.cpu(), constant)


def _ffn(block: FeedForwardBlock) -> BlockPlan:
    up_bias, up_zero = bias(block.up), _zero_rows(block.up)
    if block.gate is None:
        constant, same = block.activation(up_bias), up_zero
    else:
        gated, gate_zero = block.activation(bias(block.gate)), _zero_rows(block.gate)
        constant = gated * up_bias
        # a product is constant when both factors are, or when one of them is zero
        same = (up_zero & gate_zero) | (up_zero & (up_bias == 0)) | (gate_zero & (gated == 0))
    return BlockPlan(block, (_zero_columns(block.down) | _foldable(block, same, constant)).cpu(), constant)


def _foldable(block: Block, same: Tensor, constant: Tensor) -> Tensor:
    """Of the features that are the same for every input, those whose constant can move into the output bias, `[features]`."""
    return same if output_of(block).module.bias is not None else same & (constant == 0)


def matrix(part: Projection) -> Tensor:
    """The part's weight as `[out, in]`."""
    weight: Tensor = part.module.get_parameter("weight").detach()
    return (weight.T if isinstance(part.module, Conv1D) else weight)[part.start : part.stop]


def bias(part: Projection) -> Tensor:
    """The part's bias, zeros if it has none, `[out]`."""
    if getattr(part.module, "bias", None) is None:
        return matrix(part).new_zeros(part.stop - part.start)
    return part.module.get_parameter("bias").detach()[part.start : part.stop]


def _zero_rows(part: Projection) -> Tensor:
    return (matrix(part) == 0).all(1)


def _zero_columns(part: Projection) -> Tensor:
    return (matrix(part) == 0).all(0)


def _check_plain(part: Projection) -> None:
    module: Any = part.module
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise ValueError(
            f"{part.name} is a {type(module).__name__}; condensing rewrites plain floating-point Linear and Conv1D layers. "
            "Merge adapters (`merge_and_unload()`) and dequantize first."
        )
    if "weight" not in module._parameters:
        raise ValueError(
            f"the weight of {part.name} is computed, not a parameter; make it one first (`torch.nn.utils.prune.remove`, "
            "`torch.nn.utils.parametrize.remove_parametrizations`)."
        )
    if module.weight.is_meta:
        raise ValueError(f"the weight of {part.name} is on the meta device; load the model into memory before condensing it.")
