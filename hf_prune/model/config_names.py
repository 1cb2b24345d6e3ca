"""Which attributes of a config hold which sizes of a model: models of other sizes are built on the meta device, and compared."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .blocks import Block, at_path, blocks, layer_lists, set_at_path
from .residual import twin
from .spec import ArchitectureSpec


def with_names(model: PreTrainedModel, spec: ArchitectureSpec) -> ArchitectureSpec:
    """A spec with the attributes of the config that hold depths, widths and numbers of heads, as far as there are such."""
    lists = [[block for block in blocks(model, spec) if _in_list(model, path, block)] for path in spec.layers]
    depths = tuple(_depth(model, spec, path) for path in spec.layers)
    neurons = [_neurons(model, spec, found) for found in lists]
    heads = [_heads(model, spec, found) for found in lists]
    widths = tuple(one | other for one, (other, _) in zip(neurons, heads))
    own = tuple(attribute for _, attribute in heads)
    return replace(
        spec,
        depths=depths if all(depths) else (),
        widths=widths if any(widths) else (),
        heads=own if all(own) else (),
    )


def _in_list(model: PreTrainedModel, path: str, block: Block) -> bool:
    return block.layer.rpartition(".")[0] in layer_lists(model, path)


def _built(model: PreTrainedModel, changes: dict[str, int], by_layer: bool = False) -> PreTrainedModel | None:
    """A model of the same class by a config with other numbers, on the meta device; None if the family refuses them.

    Args:
        model: the model.
        changes: attribute → number.
        by_layer: whether lists that are as long as an old number have an entry for each layer, and become as long as the new one.
    """
    config: Any = copy.deepcopy(model.config)
    try:
        for name, number in changes.items():
            owner, before = at_path(config, name.rpartition(".")[0]), at_path(config, name)
            for other, listed in list(vars(owner).items()) if by_layer else ():
                if isinstance(listed, list) and len(listed) == before:
                    setattr(owner, other, listed[:number])
            set_at_path(config, name, number)
        return twin(model, config)
    except Exception:  # checks of the family's own, of any kind
        return None


def _named(model: PreTrainedModel, number: int) -> Iterator[str]:
    """The attributes of a model's config with this number, and those of the configs in it, by their dotted paths."""
    configs = {"": model.config} | {
        f"{name}.": value for name, value in vars(model.config).items() if isinstance(value, PreTrainedConfig)
    }
    for prefix, config in configs.items():
        yield from (prefix + name for name, value in vars(config).items() if type(value) is int and value == number)


def _lengths(model: PreTrainedModel, spec: ArchitectureSpec) -> dict[str, int]:
    return {name: len(layers) for path in spec.layers for name, layers in layer_lists(model, path).items()}


def _depth(model: PreTrainedModel, spec: ArchitectureSpec, path: str) -> str:
    """The attribute with the length of a list of layers, and of no other; `""` if there is none."""
    lengths = _lengths(model, spec)
    if path not in lengths or lengths[path] < 2:
        return ""
    for by_layer, name in itertools.product((False, True), _named(model, lengths[path])):
        other = _built(model, {name: lengths[path] - 1}, by_layer)
        if other is not None and _lengths(other, spec) == lengths | {path: lengths[path] - 1}:
            return name
    return ""


def _sizes(model: PreTrainedModel, spec: ArchitectureSpec) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {(block.layer, block.key): (block.num_units, block.num_groups, block.unit_width) for block in blocks(model, spec)}


def _makes(
    model: PreTrainedModel, spec: ArchitectureSpec, changes: dict[str, int], change: dict[Block, tuple[int, int, int]]
) -> bool:
    """Whether a config with these numbers makes exactly these blocks others: units, groups and the width of a unit."""
    other = _built(model, changes)
    wanted = _sizes(model, spec) | {(block.layer, block.key): sizes for block, sizes in change.items()}
    try:
        return other is not None and _sizes(other, spec) == wanted
    except (ValueError, RuntimeError):  # rows that do not divide into parts
        return False


def _neurons(model: PreTrainedModel, spec: ArchitectureSpec, found: list[Block]) -> dict[str, str]:
    """The attribute with the number of neurons in every layer of a list, as `ArchitectureSpec.widths` says it."""
    own = [block for block in found if block.kind == "feed_forward"]
    if len({block.num_units for block in own}) != 1:
        return {}
    half = own[0].num_units // 2
    change = dict.fromkeys(own, (half, half, 1))
    unset = (name for name, value in vars(model.config).items() if value is None and "inner" in name)  # four times the hidden size
    for name in (*_named(model, own[0].num_units), *unset):
        if _makes(model, spec, {name: half}, change):
            return {"intermediate_size": name}
    return {}


def _heads(model: PreTrainedModel, spec: ArchitectureSpec, found: list[Block]) -> tuple[dict[str, str], str]:
    """The attributes with the number of heads in every layer of a list, as `ArchitectureSpec.widths` says them if the width of a
    head does not depend on it; else `{}` and the one that `ArchitectureSpec.heads` names."""
    own = [block for block in found if block.kind == "attention"]
    if len({(block.num_units, block.num_groups, block.unit_width) for block in own}) != 1 or own[0].num_groups % 2:
        return {}, ""
    heads, groups, width = own[0].num_units, own[0].num_groups, own[0].unit_width
    fewer = dict.fromkeys(own, (heads // 2, groups // 2, width))
    wider = dict.fromkeys(own, (heads // 2, groups // 2, 2 * width))
    grouped = "num_key_value_heads" in own[0].sizes
    for name in _named(model, heads):
        for other in (name for name in _named(model, groups)) if grouped else ("",):
            names = {"num_attention_heads": name} | ({"num_key_value_heads": other} if grouped else {})
            numbers = {name: heads // 2} | ({other: groups // 2} if grouped else {})
            if _makes(model, spec, numbers, fewer):
                return names, ""
            for size in dict.fromkeys((*_named(model, width), *(["head_dim"] if hasattr(model.config, "head_dim") else []))):
                if size not in numbers and _makes(model, spec, numbers | {size: width}, fewer):
                    return names | {"head_dim": size}, ""
            if _makes(model, spec, numbers, wider):
                return {}, name
    return {}, ""
