"""Condensed models whose sizes the config of their family can express, and the stock model that pruning started from.

If all layers have the same sizes (`scope="local"`), the smaller model is an ordinary one: `intermediate_size` and, if the width of
a head is independent of the number of heads, `num_attention_heads` and `num_key_value_heads` describe it. Layers that share a
position bias (T5) must also keep the same heads, whose entries of the bias then stay. The checkpoint loads with stock classes, in
other frameworks too. The rest of `config.hf_prune` is informative, and stock code ignores it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..model import ArchitectureSpec, Block, blocks, spec_for
from ..model.blocks import Adapted, at_path, layer_lists, outlines, set_at_path
from .format import EXPERT_NEURONS, EXPERTS
from .layers import entries_by_layer, layer_counts, name_decoder_depth


def write_sizes(model: PreTrainedModel, spec: ArchitectureSpec) -> str:
    """Move the sizes in `config.hf_prune` to the config of the family, if it can express all of them; else change nothing.

    This is checked, not assumed: the stock model of the new config, built on the meta device, must have the same blocks.

    Returns:
        What is in the way, in words; `""` if nothing is.
    """
    entry: dict[str, Any] = model.config.hf_prune
    if not entry["layers"]:
        return ""
    found = blocks(model, spec)
    said, reason = sizes_in_config(model, found, spec)
    if reason:
        return reason
    smaller = copy.deepcopy(model.config)
    smaller.hf_prune = None
    for attribute, size in said.items():
        set_at_path(smaller, attribute, size)
    try:
        if not _makes(smaller, type(model.base_model), found, spec):
            return f"a stock {model.config.model_type} with {_listed(said)} has blocks of other sizes"
    except (ValueError, StrictDataclassError) as error:  # Llama's heads have to divide its hidden size
        return f"stock {model.config.model_type} refuses {_listed(said)}: {' '.join(str(error).split())}"
    except TypeError:
        return f"{type(model.base_model).__name__} cannot be made of its config alone"
    _take_positions(found)
    before = {name: at_path(model.config, name) for name in said if (at_path(model.config, name) or said[name]) != said[name]}
    for attribute, size in said.items():
        set_at_path(model.config, attribute, size)
    model.config.hf_prune = entry | {"layers": {}, "original": before | entry.get("original", {})}
    return ""


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{attribute}={size}" for attribute, size in sizes.items())


def sizes_in_config(model: Any, its_blocks: list[Block], spec: ArchitectureSpec) -> tuple[dict[str, int], str]:
    """The new values of the config attributes that hold the sizes of blocks, or else why they cannot: two blocks differ, say."""
    listed: dict[str, Any] = model.config.hf_prune["layers"]
    changed = {name for parts in listed.values() for sizes in parts.values() for name in sizes}
    found: dict[str, tuple[int, Block]] = {}
    nothing: tuple[dict[str, str], ...] = ({},) * len(spec.layers)
    for path, widths, heads in zip(spec.layers, spec.widths or nothing, spec.heads or ("",) * len(spec.layers)):
        lists = layer_lists(model, path)
        for block in its_blocks:
            sizes = {name: size for name, size in block.sizes.items() if name in changed}
            if heads and sizes.get("num_attention_heads") == at_path(model.config, heads):  # after the hidden size became smaller
                del sizes["num_attention_heads"]
            if not sizes or block.layer.rpartition(".")[0] not in lists:
                continue
            where = f"{block.layer}.{block.key}"
            if listed.get(block.layer, {}).get(block.key, {}).get("output_bias"):
                return {}, f"{where} has a new bias, for what dead units or removed layers added"
            if unsaid := [f"{name}={size}" for name, size in sizes.items() if name not in widths]:
                return {}, f"the config of {model.config.model_type} has no field for {unsaid[0]} of {where}"
            if "head_dim" in widths and block.module is not None:
                sizes["head_dim"] = block.unit_width
            for name, size in sizes.items():
                other, first = found.setdefault(widths[name], (size, block))
                if other != size:
                    return {}, f"{where} has {name}={size}, but {first.layer}.{first.key} has {name}={other}"
                if not size:
                    return {}, f"{where} has nothing left"
    for some in _biased(its_blocks):
        for block in some:
            if block.own_units != some[0].own_units:
                return {}, (
                    f"{block.layer}.{block.key} keeps heads {block.own_units}, but {some[0].layer} keeps {some[0].own_units}, "
                    "and they share a position bias"
                )
    return {attribute: size for attribute, (size, _) in found.items()}, ""


def _biased(its_blocks: list[Block]) -> list[list[Block]]:
    """The blocks that share a position bias, those of each bias together."""
    found: dict[tuple[str, str], list[Block]] = {}
    for block in its_blocks:
        if block.own_units is not None:
            found.setdefault((block.layer.rpartition(".")[0], block.key), []).append(block)
    return [some for some in found.values() if any(_table(block) for block in some)]


def _table(block: Block) -> Any:
    """The embedding of the position bias in a block, if it is there."""
    return getattr(block.module, block.spec.position_table, None) if block.spec.position_table else None


def _take_positions(its_blocks: list[Block]) -> None:
    """Leave in position biases the heads that there are, so that stock modules take them."""
    for some in _biased(its_blocks):
        for table in filter(None, map(_table, some)):
            heads = torch.tensor(some[0].own_units, device=table.weight.device)
            table.weight = nn.Parameter(table.weight.detach()[:, heads], requires_grad=table.weight.requires_grad)
            table.embedding_dim = len(heads)
    for module in (block.module for block in its_blocks if block.own_units is not None):
        if isinstance(module, Adapted):
            module.__class__ = module.stock_class
            vars(module).pop("own_heads")
            vars(module).pop("spec")


def describes(model: PreTrainedModel) -> bool:
    """Whether loading makes a model with these blocks of its config: that of one that was cut by hand says something else."""
    spec = spec_for(model.config.model_type)
    try:
        return _makes(model.config, type(model.base_model), blocks(model, spec), spec)
    except (ValueError, StrictDataclassError):
        return False


def _makes(config: PreTrainedConfig, kind: Any, wanted: list[Block], spec: ArchitectureSpec) -> bool:
    """Whether the model of a config, of class `kind`, has these blocks."""
    with torch.device("meta"):
        stock = kind(type(config).from_dict(config.to_dict()))
    return outlines(blocks(stock, spec)) == outlines(wanted)


def is_condensed(config: Any) -> bool:
    """Whether a model of this config lacks heads, neurons or layers, and not tokens alone."""
    entry = getattr(config, "hf_prune", None)
    if not isinstance(entry, dict):
        return entry is not None
    return bool(entry.get("layers") or entry.get("removed_layers")) or set(entry.get("original", {})) != {"vocab_size"}


def smaller(config: Any) -> dict[str, tuple[int, int]]:
    """What a model has less of than the one that it was made from, heads and neurons aside: name → how much now, and before."""
    entry = getattr(config, "hf_prune", None)
    if not isinstance(entry, dict):
        return {}
    names = {"hidden size": "hidden_size"}
    for name in EXPERTS:
        if name in entry.get("original", {}):
            names["experts in a layer"] = name
    if any(hasattr(config, name) for name in EXPERTS):
        names["neurons in an expert"] = next((name for name in EXPERT_NEURONS if hasattr(config, name)), "")
    if gone := entry.get("removed_layers"):
        counts = layer_counts(spec_for(config.model_type))
        names |= {f"layers in {path}": counts[path] for path in gone}
    before = stock_config(config)
    found = {what: (getattr(config, name, 0), getattr(before, name, 0)) for what, name in names.items()}
    texts: tuple[Any, Any] = (config.get_text_config(), before.get_text_config())
    found["tokens"] = (getattr(texts[0], "vocab_size", 0), getattr(texts[1], "vocab_size", 0))
    return {what: sizes for what, sizes in found.items() if sizes[0] != sizes[1]}


def stock_config(config: PreTrainedConfig) -> Any:
    """The config of the model that a condensed one was made from. Removed layers are assumed to have the type of the one before."""
    stock: Any = copy.deepcopy(config)
    entry, stock.hf_prune = getattr(config, "hf_prune", None) or {}, None
    for name, size in entry.get("original", {}).items():
        set_at_path(stock.get_text_config() if name == "vocab_size" else stock, name, size)
    if not entry.get("removed_layers"):
        return stock
    spec = spec_for(config.model_type)
    for path, indices in entry["removed_layers"].items():
        name = layer_counts(spec)[path]
        set_at_path(stock, name, at_path(stock, name) + len(indices))
        config = at_path(stock, name.rpartition(".")[0])
        for entries in (getattr(config, name) for name in entries_by_layer(config)):
            for index in indices:
                entries.insert(index, entries[max(index - 1, 0)])
    name_decoder_depth(stock, spec)
    return stock
