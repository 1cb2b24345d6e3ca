"""The format of `config.hf_prune`, and the surgery that gives a model the sizes written there.

A condensed model keeps its stock config: `num_attention_heads`, `intermediate_size` and the like stay the original ones. What
became smaller is listed beside them, under the config key `hf_prune`:

    {
        "version": 1,
        "layers": {
            "encoder.layer.0": {
                "attention.self": {"num_attention_heads": 5},
                "intermediate.dense": {"intermediate_size": 1024}
            }
        }
    }

- A layer's name is relative to the base model, so that it is the same under every task head.
- Inside a layer, a block is named after the module that splits its heads, or after the projection that makes its neurons.
- Sizes are called as in transformers' `per_layer_config`, the same in every family, and lie between 0 and the stock size.
- A block that is not listed has its stock size.

Head size never changes. Which heads and neurons survived is not recorded: the weights beside the config are theirs.

Everything here is also copied into the modelling file that a checkpoint carries, so it uses torch, transformers and the
architecture specs alone.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import ArchitectureSpec, AttentionBlock, Block, Projection, blocks


def shrink(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Shrink a model to the sizes in its `config.hf_prune`, on whatever device it is (meta too), before its weights are loaded.

    A block that has its size already is left alone, so calling this twice is calling it once.

    Raises:
        ValueError: the entry is malformed or asks for what the stock model does not have; nothing was changed.
    """
    for block, size in read_sizes(model.config.hf_prune, list(blocks(model, spec))):
        if size != block_size(block):
            keep_units(block, torch.arange(size))


def read_sizes(entry: Any, stock: list[Block]) -> list[tuple[Block, int]]:
    """The blocks that an entry names, each with its size, checked against the blocks of the stock model.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    known: dict[str, dict[str, Block]] = {}
    for block in stock:
        known.setdefault(block.layer, {})[block_key(block)] = block

    where = "config.hf_prune"
    check_keys(where, entry, ("version", "layers"))
    version = entry.get("version")
    if type(version) is not int or version != 1:
        raise ValueError(f"{where}['version'] is {version!r}; this code reads version 1. A newer hf_prune may read it.")
    layers = entry.get("layers", {})
    check_keys(f"{where}['layers']", layers, known)

    sizes: list[tuple[Block, int]] = []
    for layer, parts in layers.items():
        check_keys(f"{where}['layers'][{layer!r}]", parts, known[layer])
        for key, values in parts.items():
            block, field = known[layer][key], f"{where}['layers'][{layer!r}][{key!r}]"
            name = size_name(block)
            check_keys(field, values, (name,))
            size, limit = values.get(name), block_size(block)
            if type(size) is not int or not 0 <= size <= limit:
                raise ValueError(f"{field}[{name!r}] is {size!r}; allowed: a whole number from 0 to {limit}, the stock size.")
            sizes.append((block, size))
    return sizes


def check_keys(field: str, value: Any, allowed: Collection[str]) -> None:
    """Check that a JSON value is an object that has no other keys than these.

    Raises:
        ValueError: it is something else, or has another key; names the allowed key that comes closest.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{field} is {value!r}; it must be an object with keys among: {', '.join(allowed)}.")
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{field} has an unknown key {key!r}; allowed: {', '.join(allowed)}.{hint}")


def block_key(block: Block) -> str:
    """A block's name inside its layer."""
    return block.spec.module if isinstance(block, AttentionBlock) else block.spec.up.path


def size_name(block: Block) -> str:
    """What a block's size is called in the config entry."""
    return "num_attention_heads" if isinstance(block, AttentionBlock) else "intermediate_size"


def block_size(block: Block) -> int:
    """How many heads or neurons a block has."""
    return block.num_heads if isinstance(block, AttentionBlock) else block.num_neurons


def inputs_of(block: Block) -> list[Projection]:
    """The projections whose output rows belong to the block's heads or neurons."""
    if isinstance(block, AttentionBlock):
        return [block.query, block.key, block.value]
    return [block.up] if block.gate is None else [block.up, block.gate]


def output_of(block: Block) -> Projection:
    """The projection whose input columns belong to the block's heads or neurons."""
    return block.output if isinstance(block, AttentionBlock) else block.down


def unit_features(block: Block, units: Tensor) -> Tensor:
    """The features (rows of input projections, columns of the output projection) of some heads or neurons, `[n] → [n·width]`."""
    width = block.head_size if isinstance(block, AttentionBlock) else 1
    return (units[:, None] * width + torch.arange(width)).flatten()


def keep_units(block: Block, units: Tensor) -> None:
    """Keep only these heads or neurons of a block. `units`: their indices, ascending, `[n]` on the CPU."""
    features = unit_features(block, units)
    rows: dict[Any, list[Tensor]] = {}
    for projection in sorted(inputs_of(block), key=lambda projection: projection.start):
        rows.setdefault(projection.module, []).append(projection.start + features)
    for module, parts in rows.items():  # one part for each of the projections that are packed into the module
        keep_features(module, torch.cat(parts), outputs=True)
    keep_features(output_of(block).module, features, outputs=False)
    if isinstance(block, AttentionBlock):
        for attribute, meaning in block.spec.sizes.items():
            setattr(block.module, attribute, {"heads": len(units), "width": len(features)}[meaning])
        if len(units) == 0:
            stock: Any = type(block.module)
            output, inside = block.spec.output.path, f"{block.spec.module}."
            block.module.__class__ = without_heads(stock, output.removeprefix(inside) if output.startswith(inside) else "")


def keep_features(module: nn.Module, features: Tensor, outputs: bool) -> None:
    """Keep only these outputs (else inputs) of a Linear or Conv1D, in place; dtype, device and `requires_grad` stay."""
    stored_in_out = isinstance(module, Conv1D)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name == "bias" and not outputs:
            continue
        dim = 0 if name == "bias" or outputs != stored_in_out else 1
        kept = parameter.detach().index_select(dim, features.to(parameter.device))
        setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    if stored_in_out:
        attribute = "nf" if outputs else "nx"
    else:
        attribute = "out_features" if outputs else "in_features"
    setattr(module, attribute, len(features))


class NoHeads:
    """The `forward` of an attention module that has no head left: stock ones cannot tell the shape of a tensor without elements.

    Returns an empty context, `[batch, tokens, 0]`, or what the output projection makes of it, `[batch, tokens, hidden]`, where the
    module applies that itself; and attention weights `[batch, 0, tokens, keys]` where eager attention would return them.
    """

    config: Any
    layer_idx: int
    output_projection: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        batch, tokens = hidden_states.shape[:2]
        others = kwargs.get("encoder_hidden_states")
        keys = tokens if others is None else others.shape[1]
        cache = kwargs.get("past_key_values")
        if cache is not None and others is None:
            # The model reads the length of the past from the cache, which takes a layer without elements for an empty one.
            token = hidden_states.new_zeros(batch, 1, tokens, 1)
            keys = getattr(cache, "self_attention_cache", cache).update(token, token, self.layer_idx)[0].shape[2]
        context = hidden_states.new_zeros(batch, tokens, 0)
        if self.output_projection:
            context = getattr(self, self.output_projection)(context)
        eager = self.config._attn_implementation == "eager"
        return context, hidden_states.new_zeros(batch, 0, tokens, keys) if eager else None


@functools.cache
def without_heads(stock: Any, output_projection: str) -> type[Any]:
    """A subclass of an attention class for a module with no heads. `output_projection`: the module's own, or `""`."""
    return type(stock.__name__, (NoHeads, stock), {"__module__": stock.__module__, "output_projection": output_projection})
