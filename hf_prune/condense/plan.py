"""What can be removed: dead heads and neurons, found from the zeros in the weights, and layers without any left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model import Block, ByHead, Projection, find_blocks, spec_for
from ..model.blocks import at_path, body, has_bias, layer_lists
from ..model.lora import Adapter
from ..model.targets import BlockWeights, block_weights, computed_part, projection_target
from ..model.wrappers import transformers_model
from ..settings.errors import ConfigError
from .format import after_condensing
from .layers import depths, outline, removable


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What would be removed from one block.

    Attributes:
        block: the block.
        dead: the heads or neurons that would be removed, bool `[units]`.
        groups: indices of the key and value heads that the remaining heads would read, see `keep_units`; for neurons, the
            remaining ones.
        shift: what would be added to the output bias, `[hidden]`, in float32 at least: the constant contribution of the dead units,
            and of removed layers after this block.
        bias: the current bias of the output projection, `[hidden]`.
        adds_bias: whether the output projection has no bias yet and needs one for `shift`.
        heads: the indices of the remaining heads in the stock model, if the config has to list them.
        masked: how many heads are dead but have to stay, because others share their key and value head.
        left_out: why dead units stay, if it is not for the key and value head that they share; `""` otherwise.
        adapters: the LoRA adapters of its projections.
        entries: how many entries of its parameters by head would go.
    """

    block: Block
    dead: Tensor
    groups: Tensor
    shift: Tensor
    bias: Tensor
    adds_bias: bool
    heads: list[int] | None = None
    masked: int = 0
    left_out: str = ""
    adapters: tuple[Adapter, ...] = ()
    entries: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """The config's entry for the block afterwards, see `format.py`."""
        sizes: dict[str, Any] = dict(zip(self.block.sizes, (len(self.kept), len(self.groups))))
        if self.heads is not None:
            sizes["heads"] = self.heads
        return sizes | ({"output_bias": True} if self.adds_bias else {})

    @property
    def kept(self) -> Tensor:
        """Indices of the remaining heads or neurons, ascending."""
        return (~self.dead).nonzero().flatten()

    @property
    def dead_features(self) -> Tensor:
        """Which of the block's features belong to dead units, `[features]`."""
        return self.dead.repeat_interleave(self.block.unit_width)

    @property
    def parameters(self) -> int:
        """How many parameters would go."""
        block = self.block
        units, groups = block.num_units - len(self.kept), block.num_groups - len(self.groups)
        total = units * block.unit_width * len(self.bias) - len(self.shift) * self.adds_bias
        for part in block.inputs:
            gone = units if part is block.inputs[0] else groups
            inputs = part.layer.weight.shape[0 if isinstance(part.layer, Conv1D) else 1]
            total += gone * block.unit_width * (inputs + has_bias(part.layer))
        return total + self.entries


@dataclass(frozen=True, eq=False)
class CondensePlan:
    """What [`condense`] would do to a model, block by block.

    Attributes:
        blocks: every block, including those of removed layers.
        removed: the layers that are removed as a whole: indices by the path of their list.
        removed_parameters: layer name → parameters removed with the layer, besides those of its blocks.
    """

    blocks: tuple[BlockPlan, ...]
    removed: dict[str, list[int]] = field(default_factory=dict)
    removed_parameters: dict[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> list[BlockPlan]:
        """The blocks that lose units or absorb a constant."""
        return [plan for plan in self.blocks if plan.dead.any() or plan.shift.any()]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.changed and not self.removed

    @property
    def parameters(self) -> int:
        """How many parameters would go."""
        return sum(plan.parameters for plan in self.blocks) + sum(self.removed_parameters.values())

    def entry(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """The model's `config.hf_prune` after this plan. `before`: its current value; see `format.py` for the format."""
        changed = [plan for plan in self.changed if plan.dead.any() or plan.adds_bias]
        return after_condensing(before or {}, [(plan.block, plan.sizes) for plan in changed], self.removed)

    def to_dict(self) -> list[dict[str, Any]]:
        """One JSON object per block: `layer`, `block`, `unit`, how many it has (`before`) and keeps (`after`), how many of these
        are dead but share their key and value head with others (`masked`), why it stays as it is (`left_out`, or `""`) and the
        `parameters` saved; then one per removed layer, whose `parameters` are those that are not in its blocks."""
        rows = [
            {
                "layer": plan.block.layer,
                "block": plan.block.key,
                "unit": f"{plan.block.unit}s",
                "before": len(plan.dead),
                "after": len(plan.kept),
                "masked": plan.masked,
                "left_out": plan.left_out,
                "parameters": plan.parameters,
            }
            for plan in self.blocks
        ]
        layer = {"block": "", "unit": "layers", "before": 1, "after": 0, "masked": 0, "left_out": ""}
        return rows + [{"layer": name, **layer, "parameters": count} for name, count in self.removed_parameters.items()]

    def __str__(self) -> str:
        rows = [
            (
                f"{row['layer']}.{row['block']}".removesuffix("."),
                f"{row['after']} of {row['before']} {row['unit']}{_reason(row)}",
                f"-{row['parameters']:,}",
            )
            for row in self.to_dict()
        ]
        rows.append(("total", "", f"-{self.parameters:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{name:<{widths[0]}}  {stays:>{widths[1]}}  {saved:>{widths[2]}}" for name, stays, saved in rows)


@torch.no_grad()
def condense_plan(model: Any, pad_to_multiple_of: int | None = None) -> CondensePlan:
    """What [`condense`] would remove from a model, without changing it.

    A head is dead if its columns of the output projection are all zero, or its value rows are (it then adds a constant, since
    attention weights sum to one), but not because its queries or keys are: such a head still attends, uniformly. A neuron is dead
    if its column of the down projection is zero, or its value is the same for every input. Under grouped-query attention a key and
    value head is removed with the last of its heads; see [`regroup`] for the others.

    Args:
        model: the model, or an object that holds it (see `model/wrappers.py`).
        pad_to_multiple_of: keep enough dead neurons to make each block's size a multiple of this (or zero).

    Raises:
        ValueError: the family has no architecture spec and none can be inferred, a projection is not a plain floating-point Linear
            or Conv1D in memory, its adapter is not a plain LoRA one, there are several transformers models, or `pad_to_multiple_of`
            is not a positive whole number. A block with a projection whose weight is computed from others (`torch.nn.utils.prune`,
            `torch.nn.utils.parametrize`) is left out, with the reason.
    """
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ConfigError("pad_to_multiple_of", pad_to_multiple_of, "must be a whole number, 1 or more, or None.")
    from .infer import learn_architecture  # whose proof plans, too

    model = transformers_model(model)
    learn_architecture(model)
    found = find_blocks(model)
    for block in found:
        for part in block.projections:
            check_plain(part)
    plans = [plan_block(block, multiple) for block in found]
    removed = _without_layers(model, plans)
    sizes = {}
    for name in (f"{path}.{index}" for path, indices in removed.items() for index in indices):
        layer = body(model).get_submodule(name)
        counted = sum(plan.parameters for plan in plans if plan.block.layer == name)
        sizes[name] = sum(parameter.numel() for parameter in layer.parameters()) - counted
    return CondensePlan(tuple(plans), removed, sizes)


def plan_block(block: Block, multiple: int) -> BlockPlan:
    weights, reason = block_weights(block), computed_part(block)
    values, fixed = _fixed_features(block, weights)
    dead = torch.zeros(block.num_units, dtype=torch.bool) if reason else _dead_units(block, weights, fixed)
    if block.unit_width == 1:  # padding is for the sizes of matrices, and a head is wide enough
        dead[dead.nonzero().flatten()[: -int((~dead).sum()) % multiple]] = False
    normalised = any(entry.forward for _, _, entry in block.by_head)
    if normalised and (seen := dead & _seen_by_norms(block, dead)).any():
        dead, reason = dead & ~seen, f"{int(seen.sum())} dead heads stay, because a norm over all heads sees their queries and keys"
    kept, groups = regroup(dead, block.units_per_group, copies=not normalised)
    gone = torch.ones_like(dead)
    gone[kept] = False
    shift, own = _shift(weights, values, gone.repeat_interleave(block.unit_width)), block.own_units
    return BlockPlan(
        block=block,
        dead=gone,
        groups=groups,
        shift=shift,
        bias=weights.output[1],
        adds_bias=bool(shift.any()) and not has_bias(block.output.layer),
        heads=None if own is None else [own[unit] for unit in kept.tolist()],
        masked=int(dead.sum() - gone.sum()),
        left_out=reason,
        adapters=weights.adapters,
        entries=sum(_entries(block, by_head, len(kept), len(groups)) for by_head in block.by_head),
    )


def _entries(block: Block, by_head: tuple[Any, str, ByHead], heads: int, groups: int) -> int:
    """How many entries of a parameter go if that many heads and groups stay; those of one head always do."""
    owner, name, entry = by_head
    number, left = (block.num_units, heads) if entry.role == "query" else (block.num_groups, groups)
    return getattr(owner, name).numel() // number * (number - max(left, 1)) if number else 0


def _shift(weights: BlockWeights, values: Tensor, gone: Tensor) -> Tensor:
    """What features that are `gone` (bool `[features]`) add to the output by their values, `[hidden]`, in float32 at least."""
    matrix = weights.output[0]
    features = gone.to(matrix.device)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return matrix[:, features].to(wide) @ values[features].to(wide)


def _without_layers(model: nn.Module, plans: list[BlockPlan]) -> dict[str, list[int]]:
    """The layers to remove, by the path of their list; in `plans`, their constants are added to the last remaining block before."""
    config: Any = model.config
    spec, removed = spec_for(config.model_type), {}
    for path in depths(model, spec):
        layers = [layer for layers in layer_lists(model, path).values() for layer in layers]
        members = [[i for i, plan in enumerate(plans) if plan.block.layer == f"{path}.{index}"] for index in range(len(layers))]
        crosses = bool(getattr(config, "is_encoder_decoder", False))
        scales = [_output_scale(layer, plans[places[-1]]) if places else None for layer, places in zip(layers, members)]
        absorb = all(scale is None or bool(scale.all()) for scale in scales)
        constants = [_constant(layer, [plans[i] for i in places], crosses, absorb) for layer, places in zip(layers, members)]
        gone = removable(constants, [outline(layer) for layer in layers])
        keeper = kept_layer = -1
        for index, places in enumerate(members):
            if index not in gone:
                keeper, kept_layer = places[-1], index
                continue
            constant = constants[index]
            if constant is not None and constant.any():
                constant = constant if (scale := scales[kept_layer]) is None else constant / scale
                shift = plans[keeper].shift + constant.to(plans[keeper].shift)
                lacks = not has_bias(plans[keeper].block.output.layer)
                plans[keeper] = replace(plans[keeper], shift=shift, adds_bias=lacks)
            for i in places:
                plans[i] = replace(plans[i], shift=torch.zeros_like(plans[i].shift), adds_bias=False)
        if gone:
            removed[path] = gone
    return removed


def _constant(layer: nn.Module, plans: list[BlockPlan], crosses: bool, absorb: bool) -> Tensor | None:
    """The constant that a layer adds, `[hidden]`, if no block of it has a unit left and a layer before it can add that, else None.

    A decoder without encoder states skips cross-attention, so its constant counts only if the model always `crosses`. No bias
    before a norm makes up for a constant behind it, nor one before a scale of zero: then layers `absorb` none.
    """
    if not plans or any(len(plan.kept) for plan in plans):
        return None
    terms = [_added(layer, plan, plans[0].shift) for plan in plans]
    attentions = [term for plan, term in zip(plans, terms) if plan.block.kind == "attention"]
    if not crosses and any(bool(term.any()) for term in attentions[1:]):
        return None
    constant = torch.stack(terms).sum(0)
    if constant.any() and (not absorb or any(plan.block.spec.norm for plan in plans)):
        return None
    return constant


def _added(layer: nn.Module, plan: BlockPlan, like: Tensor) -> Tensor:
    """What a block without units adds to the stream, `[hidden]`, with the dtype and device of `like`."""
    term = (plan.bias.to(plan.shift) + plan.shift).to(like)
    if plan.block.spec.norm:
        norm = at_path(layer, plan.block.spec.norm)
        term = norm(term.to(norm.weight)).to(like)
    scale = _output_scale(layer, plan)
    return term if scale is None else term * scale.to(like)


def _output_scale(layer: nn.Module, plan: BlockPlan) -> Tensor | None:
    """What the result of a block is multiplied with before it is added to the stream, `[hidden]`."""
    scale: Tensor | None = at_path(layer, plan.block.spec.scale) if plan.block.spec.scale else None
    return scale


def _reason(row: dict[str, Any]) -> str:
    if row["left_out"]:
        return f" ({row['left_out']})"
    return f" ({row['masked']} of them dead, but their key and value heads are shared)" if row["masked"] else ""


@torch.no_grad()
def dead_units(block: Block) -> Tensor:
    """The heads or neurons whose contribution to the output is constant, bool `[units]`; see [`condense_plan`]."""
    weights = block_weights(block)
    return _dead_units(block, weights, _fixed_features(block, weights)[1])


def _dead_units(block: Block, weights: BlockWeights, fixed: Tensor) -> Tensor:
    """The units that are `fixed` (bool `[units]`), or whose features the output projection does not read."""
    unread = ~weights.output[0].any(0).view(block.num_units, block.unit_width).any(1)
    return (unread | fixed).cpu()


def _fixed_features(block: Block, weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """The values of features whose rows are zero, `[features]`, and the units that have these values for every input, `[units]`.

    The values are meaningless for features of other units.
    """
    values = {role: (bias, ~weight.any(1)) for role, (weight, bias) in weights.makers.items()}
    if "value" in values:  # attention weights sum to one
        value, zero = (rows.view(block.num_groups, block.unit_width) for rows in values["value"])
        return value.repeat_interleave(block.units_per_group, 0).flatten(), zero.all(1).repeat_interleave(block.units_per_group)
    up, up_zero = values["up"]
    if "gate" not in values:
        return block.activation(up), up_zero
    gate, gate_zero = block.activation(values["gate"][0]), values["gate"][1]
    # a product is constant when both factors are, or when one of them is zero
    return gate * up, (up_zero & gate_zero) | (up_zero & (up == 0)) | (gate_zero & (gate == 0))


@torch.no_grad()
def _seen_by_norms(block: Block, dead: Tensor) -> Tensor:
    """The heads whose queries, or whose keys if all that share them are `dead`, are not zero, bool `[heads]`."""
    alive = []
    for part, number in ((block.roles["query"], block.num_units), (block.roles["key"], block.num_groups)):
        rows = projection_target(part).weight()[part.rows]
        zero = ~rows.any(1) if part.layer.bias is None else ~(rows.any(1) | part.layer.bias[part.rows].bool())
        alive.append(~zero.view(number, block.unit_width).all(1).cpu())
    queries, keys = alive
    without = dead.view(block.num_groups, -1).all(1) & keys
    return queries | without.repeat_interleave(block.units_per_group)


def regroup(dead: Tensor, per_group: int, copies: bool = True) -> tuple[Tensor, Tensor]:
    """The heads to keep, and the key and value heads they read, if every `per_group` heads share one.

    All groups of a block must have the same size. Either each living group keeps as many heads as the largest has living ones, so
    that some dead heads stay, masked; or each living head gets a copy of its key and value head, which unties these in further
    training. Copies are made only if that is smaller and needs no more key and value heads, and so no larger cache, than the block
    has.

    Args:
        dead: bool `[heads]`.
        copies: whether key and value heads may be copied.

    Returns:
        Indices of heads, ascending, `[n]`, and of key and value heads, `[m]`, where m divides n.
    """
    alive = ~dead.view(-1, per_group)
    groups = alive.any(1).nonzero().flatten()
    largest = int(alive.sum(1).max()) if len(alive) else 0
    first_alive = alive[groups].int().argsort(dim=1, descending=True, stable=True)[:, :largest].sort(dim=1).values
    heads = (groups[:, None] * per_group + first_alive).flatten()
    living = (~dead).nonzero().flatten()
    if copies and len(living) <= len(alive) and 2 * len(living) < len(heads) + len(groups):
        return living, living // per_group
    return heads, groups


def check_plain(part: Projection) -> None:
    """Check that a projection can be cut.

    Raises:
        ValueError: it is no plain floating-point Linear or Conv1D in memory.
    """
    module = part.layer
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise ValueError(
            f"{part.name} is a {type(module).__name__}; condensing rewrites plain floating-point Linear and Conv1D layers. "
            "Dequantize it first."
        )
    if module.weight.is_meta:
        raise ValueError(f"the weight of {part.name} is on the meta device; load the model into memory before condensing it.")
