"""The blocks of a model by the spec of its family; what the spec names but the model does not have is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..settings.errors import closest
from .blocks import Block, at_path, blocks, body, layer_lists, missing
from .families import spec_for
from .spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec
from .wrappers import transformers_models


def find_blocks(model: Any) -> list[Block]:
    """The blocks of a transformers model, or of all transformers models inside a wrapper, by their `config.model_type`.

    Raises:
        ValueError: a family has no spec, or a model does not match its spec; see [`check_spec`].
    """
    found: list[Block] = []
    for name, one in (transformers_models(model) or {"": model}).items():
        spec = spec_for(str(getattr(getattr(one, "config", None), "model_type", None)))
        check_spec(one, spec)
        found += blocks(one, spec, f"{name}." if name else "")
    return found


def check_spec(model: Any, spec: ArchitectureSpec) -> None:
    """Check that a model has what a spec names, so that nothing is skipped by mistake.

    A model may be only a part of its family's (an encoder): a list of layers that it lacks is skipped if it has no other list that
    could be meant. In each list, some layer has attention, if the spec names any, and some layer a feed-forward block. Every block
    is in some layer of the model, except that an `optional` one may be missing unless a layer has attention that no block names. A
    block has all of its modules.

    Raises:
        ValueError: names the path, the class of the model, and the closest match.
    """
    lists = {path: layer_lists(model, path) for path in spec.layers}
    absent = [path for path, found in lists.items() if not found]
    others = _lists_besides(model, [name for found in lists.values() for name in found])
    if absent and (others or len(absent) == len(lists)):
        raise _lacks(model, absent[0], "a list of layers", others)
    for name in spec.depths:
        tower = at_path(model.config, name.rpartition(".")[0])  # that of a part of the model is its own config, and no tower of it
        if tower is not None and at_path(tower, name.rpartition(".")[2]) is None:
            raise _lacks(model.config, name, "the number of layers", vars(model.config))

    everyone: tuple[AttentionSpec | FeedForwardSpec, ...] = (*spec.attentions, *spec.feed_forwards)
    layers = {path: [layer for members in lists[path].values() for layer in members] for path in lists}
    lacking = {layer: missing(layer, map(_place, everyone)) for members in layers.values() for layer in members}
    for path, members in layers.items():
        for kind in (spec.attentions, spec.feed_forwards):
            if members and kind and all(_place(block) in lacking[layer] for layer in members for block in kind):
                raise _lacks(model, f"{path}.*.{_place(kind[0])}", "a block of a layer", _below(members[0], f"{path}.*."))
    for block in everyone:
        there = [layer for layer in lacking if _place(block) not in lacking[layer]]
        if lacking and not there:
            unnamed = [name for layer in lacking for name in _unnamed(layer, block, spec)]
            if unnamed or not block.optional:
                raise _lacks(model, _place(block), "a block of a layer", unnamed or _below(next(iter(lacking))))
        for layer in there:
            _check_block(model, layer, block)


def _check_block(model: Any, layer: nn.Module, block: AttentionSpec | FeedForwardSpec) -> None:
    """Check that a layer has all modules of a block."""
    if isinstance(block, FeedForwardSpec):
        parts, modules = [block.up, block.down, *([block.gate] if block.gate else [])], [block.activation]
        modules += [block.norm] if block.norm else []
    else:
        module = at_path(layer, block.module)
        parts = [block.query, block.key, block.value, block.output]
        modules = [f"{block.module}.{name}" for name in (*block.after, block.residual_norm) if name]
        modules += [block.norm] if block.norm else []
        for attribute in (block.head_size, *block.sizes):
            if at_path(module, attribute) is None:
                raise _lacks(module, attribute, "an attribute", vars(module))
    if absent := missing(layer, (*(part.path for part in parts), *modules)):
        raise _lacks(model, absent[0], "a module of a layer", _below(layer))


def _place(block: AttentionSpec | FeedForwardSpec) -> str:
    return block.module if isinstance(block, AttentionSpec) else block.up.path


def _unnamed(layer: nn.Module, block: AttentionSpec | FeedForwardSpec, spec: ArchitectureSpec) -> list[str]:
    """The modules of a layer that look like attention but are named by no block of the spec."""
    if isinstance(block, FeedForwardSpec):
        return []
    named = [other.module for other in spec.attentions]
    return [name for name, module in layer.named_modules() if hasattr(module, block.head_size) and name not in named]


def _lists_besides(model: Any, known: list[str]) -> list[str]:
    """The paths of a model's lists of layers other than the `known` ones and those inside them."""
    inside = tuple(f"{name}." for name in known)
    names = [name for name, module in body(model).named_modules() if isinstance(module, nn.ModuleList) and name not in known]
    return sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in names if not f"{name}.".startswith(inside)})


def _below(layer: nn.Module, prefix: str = "") -> list[str]:
    return [prefix + name for name, _ in layer.named_modules() if name]


def _lacks(owner: object, path: str, what: str, there: Iterable[str]) -> ValueError:
    near = closest(path, there)
    hint = f" Did you mean {near!r}?" if near else ""
    return ValueError(f"{type(owner).__name__} has no {path!r}, which the architecture spec of its family names as {what}.{hint}")
