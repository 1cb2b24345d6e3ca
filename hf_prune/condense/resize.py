"""Resizing a model to the sizes in its `config.hf_prune`.

What loading needs of this module is also copied into the modelling file of a checkpoint, so it uses only torch, transformers and
the architecture specs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model import ArchitectureSpec, Block, ByHead, Projection, blocks
from ..model.blocks import Adapted, adapted, has_bias, hidden_size_name, layer_lists, out_features
from .format import check_original, check_removed, read_sizes
from .forwards import NoHeads

#: `(parameter, dim, indices)` → slices of the parameter along a dimension.
Select = Callable[[Tensor, int, Tensor], Tensor]


def shrink(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Shrink a model to the sizes in its `config.hf_prune`, on any device (including meta), before its weights are loaded.

    Idempotent: a block that already has its size is left alone. A model that is only part of the condensed one (the decoder of an
    encoder-decoder) uses the entries of the layers that it has.

    Raises:
        ValueError: the entry is malformed or does not fit the stock model; nothing was changed.
    """
    entry = model.config.hf_prune
    lists = {path: layer_lists(model, path) for path in spec.layers}
    if isinstance(entry, dict):
        check_original(entry.get("original", {}), own_sizes(model.config, spec))
    found = read_sizes(entry, blocks(model, spec), [path for path, found in lists.items() if not found], spec.heads)
    check_removed(entry.get("removed_layers", {}), {path: sum(map(len, found.values())) for path, found in lists.items()})
    for block, sizes in found:
        if sizes.get("output_bias"):
            add_bias(block.output.layer)
        stock = block.sizes
        if any(sizes[name] != size for name, size in stock.items()):
            # of more heads than the stock model has, the weights are still to come, too
            kept = (torch.arange(sizes[name], device="cpu") % size for name, size in stock.items())
            keep_units(block, *kept, own_heads=sizes.get("heads"))


def own_sizes(config: Any, spec: ArchitectureSpec) -> list[str]:
    """The attributes of a family's config that hold sizes which hf_prune changes."""
    widths = [attribute for each in spec.widths for attribute in each.values()]
    return [hidden_size_name(config), *widths, *spec.heads, *spec.as_hidden]


def keep_units(
    block: Block,
    units: Tensor,
    groups: Tensor | None = None,
    *,
    own_heads: list[int] | None = None,
    select: Select = torch.index_select,
) -> None:
    """Keep only these heads or neurons of a block.

    Args:
        block: the block.
        units: indices of heads or neurons, ascending, `[n]` on the CPU.
        groups: indices of the key and value heads that they read, in equal shares, `[m]`; duplicates are copied. Default: unit `i`
            reads group `i`.
        own_heads: the indices of these heads in the stock model, for an attention module that needs to know them.
        select: what takes slices of a parameter.
    """
    groups = units if groups is None else groups
    for part, outputs in block.outputs_of(units, groups):
        keep_features(part, outputs, outputs=True, select=select)
    features = block.features(units)
    keep_features(block.output, features, outputs=False, select=select)
    for owner, name, entry in block.by_head:
        kept, number = (units, block.num_units) if entry.role == "query" else (groups, block.num_groups)
        _keep_entries(owner, name, entry, kept, number, select)
    if block.module is not None:
        sizes = {"heads": len(units), "width": len(features), "key_value_heads": len(groups)}
        sizes["groups"] = max(len(units) // max(len(groups), 1), 1)
        for attribute, meaning in block.attributes.items():
            set_attribute(block.module, attribute.removeprefix("config."), sizes[meaning])
        adapt_forward(block, len(units))
        if own_heads is not None:
            set_attribute(block.module, "own_heads", own_heads)


def _keep_entries(owner: Any, name: str, entry: ByHead, kept: Tensor, number: int, select: Select) -> None:
    """Keep only the entries of some of `number` heads; of none those of the first, frozen, as stock code may read them first."""
    parameter = getattr(owner, name)
    size, some = parameter.shape[entry.dim], kept if len(kept) else kept.new_zeros(1)
    index = (some[:, None] * (size // number) + torch.arange(size // number, device="cpu")).flatten()
    values = select(parameter, entry.dim, index.to(parameter.device)).detach()
    setattr(owner, name, nn.Parameter(values, requires_grad=parameter.requires_grad and len(kept) > 0))
    for attribute in {"embedding_dim", "out_features"} & vars(owner).keys():
        set_attribute(owner, attribute, len(index))
    if entry.forward:
        set_attribute(owner, "stock_width", vars(owner).get("stock_width", size))
        owner.__class__ = adapted(getattr(owner, "stock_class", owner.__class__), (_forward(entry.forward),))


def adapt_forward(block: Block, heads: int) -> None:
    """Give an attention module a `forward` that works with that many heads left, if the stock one would fail."""
    module = block.module
    mixins = tuple(map(_forward, block.spec.forwards)) + ((NoHeads,) if heads == 0 else ())
    if mixins:
        set_attribute(module, "spec", block.spec)
        module.__class__ = adapted(getattr(module, "stock_class", module.__class__), mixins)


def _forward(name: str) -> type:
    """The class of `forwards.py` of that name."""
    return next(each for each in Adapted.__subclasses__() if each.__name__ == name)


def add_bias(layer: Any) -> None:
    """Add a bias of zeros to a projection without one."""
    if not has_bias(layer):
        layer.bias = nn.Parameter(layer.weight.detach().new_zeros(out_features(layer)), requires_grad=layer.weight.requires_grad)


def set_attribute(module: Any, name: str, value: Any) -> None:
    """`setattr` for attributes that the type of `module` does not declare."""
    setattr(module, name, value)


def keep_features(part: Projection, features: Tensor, outputs: bool, select: Select = torch.index_select) -> None:
    """Keep only these outputs (else inputs) of a projection's module, in place.

    LoRA adapters, active or not, keep the same outputs of B (inputs of A).
    """
    layers = [part.layer]
    if part.module is not part.layer:
        lora: Any = part.module
        layers += (lora.lora_B if outputs else lora.lora_A).values()
        set_attribute(lora, "out_features" if outputs else "in_features", len(features))
    for layer in layers:
        _keep_features(layer, features, outputs, select)


def _keep_features(module: nn.Module, features: Tensor, outputs: bool, select: Select) -> None:
    """Keep only these outputs (else inputs) of a Linear or Conv1D, in place; dtype, device and `requires_grad` stay.

    A projection without inputs returns its bias, see [`NoInputs`]; parameters without elements are frozen.
    """
    stored_in_out = isinstance(module, Conv1D)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name == "bias" and not outputs:
            continue
        dim = 0 if name == "bias" or outputs != stored_in_out else 1
        kept = select(parameter, dim, features.to(parameter.device)).detach()
        # without elements it never gets a gradient, which distributed training treats as an error
        setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad and kept.numel() > 0))
    sizes = ("nx", "nf") if stored_in_out else ("in_features", "out_features")
    set_attribute(module, sizes[outputs], len(features))
    if not outputs and len(features) == 0:
        module.__class__ = NoInputsConv1D if stored_in_out else NoInputsLinear


class NoInputs:
    """The `forward` of a projection without inputs, which returns its bias: Conv1D and ONNX fail on tensors without elements."""

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        shape = (*input.shape[:-1], out_features(module))
        return module.bias.expand(shape).clone() if has_bias(module) else input.new_zeros(shape)


class NoInputsLinear(NoInputs, nn.Linear):
    stock_class = nn.Linear


class NoInputsConv1D(NoInputs, Conv1D):
    stock_class = Conv1D
