"""Condensed models whose sizes the config of their family can express, and the stock model that pruning started from.

If all layers have the same sizes (`scope="local"`), the smaller model is an ordinary one: `intermediate_size` and, if the width of
a head is independent of the number of heads, `num_attention_heads` and `num_key_value_heads` describe it. Its checkpoint then loads
with stock classes, in other frameworks too. The rest of `config.hf_prune` is informative, and stock code ignores it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..model import ArchitectureSpec, Block, blocks, spec_for
from ..model.blocks import layer_lists, outlines
from .layers import layer_counts, name_decoder_depth


def write_sizes(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Move the sizes in `config.hf_prune` to the config of the family, if it can express all of them; else change nothing.

    This is checked, not assumed: the stock model of the new config, built on the meta device, must have the same blocks.
    """
    entry: dict[str, Any] = model.config.hf_prune
    changed = {name for parts in entry["layers"].values() for sizes in parts.values() for name in sizes}
    found = blocks(model, spec)
    said = sizes_in_config(model, found, spec, changed)
    if not said:
        return
    smaller = copy.deepcopy(model.config)
    smaller.hf_prune = None
    for attribute, size in said.items():
        setattr(smaller, attribute, size)
    try:
        if not _makes(smaller, type(model.base_model), found, spec):
            return
    except TypeError:  # a class of somebody's own that wants more than a config
        return
    before = {name: getattr(model.config, name) for name in said if getattr(model.config, name, said[name]) != said[name]}
    for attribute, size in said.items():
        setattr(model.config, attribute, size)
    model.config.hf_prune = entry | {"layers": {}, "original": before | entry.get("original", {})}


def sizes_in_config(model: nn.Module, its_blocks: list[Block], spec: ArchitectureSpec, changed: set[str]) -> dict[str, int]:
    """The new values of the config attributes that hold the sizes in `changed`, named as in `config.hf_prune`.

    Empty if two blocks differ, or one has no unit left.
    """
    found: dict[str, set[int]] = {}
    for path, widths in zip(spec.layers, spec.widths):
        lists = layer_lists(model, path)
        for block in its_blocks:
            if block.layer.rpartition(".")[0] in lists:
                own = block.sizes | ({} if block.module is None else {"head_dim": block.unit_width})
                for name, size in own.items() if changed & block.sizes.keys() else ():
                    if (name in changed or name not in block.sizes) and name in widths:
                        found.setdefault(widths[name], set()).add(size)
    sizes = [(attribute, min(values)) for attribute, values in found.items() if len(values) == 1]
    return dict(sizes) if len(sizes) == len(found) and all(size for _, size in sizes) else {}


def describes(model: PreTrainedModel) -> bool:
    """Whether loading makes a model with these blocks of its config: that of one that was cut by hand says something else."""
    spec = spec_for(model.config.model_type)
    return _makes(model.config, type(model.base_model), blocks(model, spec), spec)


def _makes(config: PreTrainedConfig, kind: Any, wanted: list[Block], spec: ArchitectureSpec) -> bool:
    """Whether the model of a config, of class `kind`, has these blocks."""
    try:
        with torch.device("meta"):
            stock = kind(type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError):  # Llama's heads have to divide its hidden size
        return False
    return outlines(blocks(stock, spec)) == outlines(wanted)


def stock_config(config: PreTrainedConfig, spec: ArchitectureSpec) -> Any:
    """The config of the model that a condensed one was made from. Removed layers are assumed to have the type of the one before."""
    stock: Any = copy.deepcopy(config)
    entry, stock.hf_prune = getattr(config, "hf_prune", None) or {}, None
    for name, size in entry.get("original", {}).items():
        setattr(stock, name, size)
    for path, indices in entry.get("removed_layers", {}).items():
        name = layer_counts(spec)[path]
        setattr(stock, name, getattr(stock, name) + len(indices))
        if getattr(stock, "layer_types", None) is not None:
            for index in indices:
                stock.layer_types.insert(index, stock.layer_types[max(index - 1, 0)])
    if entry.get("removed_layers"):
        name_decoder_depth(stock, spec)
    return stock
