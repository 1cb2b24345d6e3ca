"""Specs resolved against a real model: the attention and feed-forward blocks with their modules and sizes."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .spec import ArchitectureSpec, ByHead, Part


def active_copy(module: Any) -> Any:
    """The active copy of a module that PEFT's `modules_to_save` names; any other module itself."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return module
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active else module.original_module


class Adapted:
    """Base of the mixins that give modules of stock classes a different `forward`; see [`adapted`]."""

    stock_class: type[Any]
    mixins: tuple[type[Any], ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the mixins and the stock class, since no module contains the class itself."""
        stock: Any = super()
        _, _, *state = stock.__reduce_ex__(max(protocol, 2))
        return _new, (self.stock_class, self.mixins), *state


@functools.cache
def adapted(stock: Any, mixins: tuple[type[Any], ...]) -> type[Any]:
    """A subclass of a stock class with the same name and [`Adapted`] mixins in front."""
    return type(stock.__name__, (*mixins, stock), {"__module__": stock.__module__, "stock_class": stock, "mixins": mixins})


def _new(stock: Any, mixins: tuple[type[Any], ...]) -> Any:
    cls: Any = adapted(stock, mixins)
    return cls.__new__(cls)


def is_adapted(module: Any) -> bool:
    """Whether a module is a PEFT layer around a layer of the model."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def base_layer(module: Any) -> Any:
    """The layer of the model under its adapters, if it has any."""
    while is_adapted(module):
        module = module.base_layer
    return module


def out_features(layer: Any) -> int:
    """Number of outputs of a Linear or of GPT-2's Conv1D (whose weight is stored `[in, out]`)."""
    return int(layer.weight.shape[1 if isinstance(layer, Conv1D) else 0])


def has_bias(module: Any) -> bool:
    """Whether a projection has a bias."""
    return module.bias is not None


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection of a block.

    Attributes:
        name: the name of its module in the model, without PEFT's additions.
        module: the module, with its adapters.
        layer: the layer of the model under the adapters.
        part: its entry in the spec.
        rows: which outputs of the module belong to it, `[n]` on the CPU.
        index: the index of its rows in a matrix: a slice, which gives a view, if they are contiguous, else `rows`.
    """

    name: str
    module: nn.Module
    layer: Any
    part: Part
    rows: Tensor
    index: slice | Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """An attention or feed-forward block: parallel units, each with `unit_width` rows of every projection in `inputs` and as many
    columns of `output`.

    Rows of the first input belong to one unit each. Rows of the others belong to `units_per_group` neighbouring units: one, except
    for key and value heads that several query heads share.

    Attributes:
        kind: `"attention"` or `"feed_forward"`.
        unit: what its units are, `"head"` or `"neuron"`; the pattern of that name prunes them.
        layer: the layer's name without the task head's prefix.
        name: the block's name in the model.
        key: its path in the layer, by which `config.hf_prune` names it.
        roles: role (`query`, `key`, `value`, `up`, `gate`, …) → projection, the output projection last.
        num_units: number of heads or neurons.
        num_groups: number of groups of units that share rows: key and value heads; fewer than heads under grouped-query attention.
        sizes: the sizes that condensing changes, by their names in the config: the number of units, and that of groups if there can
            be fewer.
        unit_width: rows of an input, and columns of the output, per unit.
        module: the module whose `forward` splits features into units; None if there is none.
        attributes: the attributes of the module that hold the number of units, see `AttentionSpec.sizes`.
        by_head: parameters beside the projections that have entries for every head: their module, name and entry in the spec.
        own_units: the indices of the units in the stock model, where the module has to know them.
        activation: the activation function of a neuron; None for heads.
        spec: the spec that describes it.
    """

    kind: str
    unit: str
    layer: str
    name: str
    key: str
    roles: Mapping[str, Projection]
    num_units: int
    num_groups: int
    sizes: dict[str, int]
    spec: Any
    unit_width: int = 1
    module: Any = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    by_head: tuple[tuple[Any, str, ByHead], ...] = ()
    own_units: list[int] | None = None
    activation: Any = None

    @functools.cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The inputs, then the output."""
        return tuple(self.roles.values())

    @functools.cached_property
    def inputs(self) -> tuple[Projection, ...]:
        """The projections whose rows belong to units."""
        return self.projections[:-1]

    @functools.cached_property
    def output(self) -> Projection:
        """The projection whose columns belong to units."""
        return self.projections[-1]

    @functools.cached_property
    def makers(self) -> dict[str, Projection]:
        """The inputs that compute the features, by role; queries and keys only weight them."""
        return {role: self.roles[role] for role in ("value", "up", "gate") if role in self.roles}

    @functools.cached_property
    def units_per_group(self) -> int:
        """How many units share rows (1 if no unit is left)."""
        return self.num_units // self.num_groups if self.num_units else 1

    def features(self, units: Tensor) -> Tensor:
        """The rows of an input, or columns of the output, of some units or groups, `[n] → [n·width]`."""
        return (units[:, None] * self.unit_width + torch.arange(self.unit_width, device="cpu")).flatten()

    def outputs_of(self, units: Tensor, groups: Tensor) -> list[tuple[Projection, Tensor]]:
        """Which outputs of the modules of `inputs` belong to some units and groups, in the order that the modules need them in.

        Returns:
            For each module a projection in it and the indices of its outputs, `[n]` on the CPU.
        """
        own, shared = self.features(units), self.features(groups)
        modules: dict[nn.Module, list[tuple[Projection, Tensor]]] = {}
        for part in self.inputs:
            modules.setdefault(part.module, []).append((part, part.rows[own if part is self.inputs[0] else shared]))
        found, shares = [], max(len(units) // max(len(groups), 1), 1)
        for packed in modules.values():
            outputs = torch.empty(sum(len(rows) for _, rows in packed), dtype=torch.long, device="cpu")
            for part, rows in packed:
                outputs[_rows(part.part, len(outputs), self.unit_width, self.inputs[0].part, shares)] = rows
            found.append((packed[0][0], outputs))
        return found


def outlines(found: Iterable[Block]) -> list[Hashable]:
    """Everything that condensing changes in some blocks: their names, sizes, and what weights and biases their projections have."""
    return [
        (
            block.layer,
            block.key,
            block.unit_width,
            tuple(block.sizes.items()),
            tuple((tuple(part.layer.weight.shape), has_bias(part.layer)) for part in block.projections),
        )
        for block in found
    ]


def at_path(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None; for no path the root itself."""
    for step in filter(None, path.split(".")):
        root = active_copy(getattr(root, step, None))
    return root


def set_at_path(root: Any, path: str, value: Any) -> None:
    """Set the attribute at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(at_path(root, owner), name, value)


def missing(root: Any, paths: Iterable[str]) -> list[str]:
    """The dotted paths, of these, at which there is nothing."""
    return [path for path in paths if at_path(root, path) is None]


def _projection(layer: nn.Module, layer_name: str, part: Part, first: Part, width: int = 1, units_per_group: int = 1) -> Projection:
    module = at_path(layer, part.path)
    if module is None:
        raise ValueError(f"{layer_name} has no {part.path}, which the architecture spec of its family names.")
    inner = base_layer(module)
    rows = _rows(part, out_features(inner), width, first, units_per_group)
    start = int(rows[0]) if len(rows) else 0
    whole = torch.arange(start, start + len(rows), device="cpu")
    index = slice(start, start + len(rows)) if rows.equal(whole) else rows
    return Projection(f"{layer_name}.{part.path}", module, inner, part, rows, index)


def _rows(part: Part, size: int, width: int, first: Part, units_per_group: int) -> Tensor:
    """A projection's rows among its module's `size` outputs, ascending, if a unit has `width` of them and a group has
    `units_per_group` units in the `first` input, one in others."""
    counts = [units_per_group if (part.path, index) == (first.path, first.index) else 1 for index in range(part.parts)]
    own = slice(sum(counts[: part.index]), sum(counts[: part.index + 1]))
    rows = torch.arange(size, device="cpu")
    return (rows.view(-1, sum(counts), width)[:, own] if part.interleaved else rows.view(sum(counts), -1)[own]).flatten()


def body(model: Any) -> Any:
    """The base model inside a model with a task head; a model without one is its own body."""
    return getattr(model, "base_model", model)


def body_prefix(model: nn.Module) -> str:
    """The prefix of module names in a model's body, `""` for a base model."""
    inner = body(model)
    return next((f"{name}." for name, module in model.named_modules() if module is inner and name), "")


def layer_lists(model: Any, path: str) -> dict[str, Any]:
    """The module lists in a model's body at a path of `ArchitectureSpec.layers`, by their names; empty if there are none."""
    found = {"": body(model)}
    for step in path.split("."):
        found = {
            f"{name}.{key}" if name else key: child
            for name, module in found.items()
            for key, child in module.named_children()
            if step in ("*", key)
        }
    return {name: module for name, module in found.items() if isinstance(module, (nn.ModuleList, nn.Sequential))}


def blocks(model: nn.Module, spec: ArchitectureSpec, prefix: str = "") -> list[Block]:
    """Every block of a transformers model that `spec` describes, layer by layer, with or without adapters.

    Args:
        model: the model; parts that the spec names but the model lacks are skipped.
        spec: the spec of its family.
        prefix: prefix of the blocks' names, for a model inside another.

    Raises:
        ValueError: a block lacks a projection.
    """
    prefix += body_prefix(model)
    return [
        block
        for path in spec.layers
        for list_name, layers in layer_lists(model, path).items()
        for index, layer in enumerate(layers)
        for block in _blocks_of(layer, f"{list_name}.{index}", prefix, spec)
    ]


def _blocks_of(layer: nn.Module, short: str, prefix: str, spec: ArchitectureSpec) -> Iterator[Block]:
    """The blocks of one layer; `short`: its name in the body."""
    full = prefix + short
    for attention in spec.attentions:
        if (module := at_path(layer, attention.module)) is not None:
            parts = {"query": attention.query, "key": attention.key, "value": attention.value}
            parts |= {part.path.rpartition(".")[2]: part for part in attention.extra if at_path(layer, part.path) is not None}
            parts["output"] = attention.output
            width = getattr(module, attention.head_size)
            known = {meaning: at_path(module, name) or 1 for name, meaning in attention.sizes.items()}
            heads = known.get("heads", 1)
            shares = known.get("groups") or heads // known.get("key_value_heads", heads) or 1
            roles = {role: _projection(layer, full, part, attention.query, width, shares) for role, part in parts.items()}
            heads, groups = (len(roles[role].rows) // width for role in ("query", "value"))
            grouped = not {"groups", "key_value_heads"}.isdisjoint(attention.sizes.values())
            yield Block(
                kind="attention",
                unit="head",
                layer=short,
                name=f"{full}.{attention.module}",
                key=attention.module,
                roles=roles,
                num_units=heads,
                num_groups=groups,
                sizes={"num_attention_heads": heads, **({"num_key_value_heads": groups} if grouped else {})},
                spec=attention,
                unit_width=width,
                module=module,
                attributes=attention.sizes,
                by_head=tuple(
                    (at_path(layer, own.path.rpartition(".")[0]), own.path.rpartition(".")[2], own)
                    for own in attention.by_head
                    if at_path(layer, own.path) is not None
                ),
                own_units=list(getattr(module, "own_heads", range(heads))) if attention.position_bias else None,
            )
    for ffn in spec.feed_forwards:
        if at_path(layer, ffn.up.path) is not None:
            parts = {"up": ffn.up, **({"gate": ffn.gate} if ffn.gate else {}), "down": ffn.down}
            roles = {role: _projection(layer, full, part, ffn.up) for role, part in parts.items()}
            neurons = len(roles["up"].rows)
            yield Block(
                kind="feed_forward",
                unit="neuron",
                layer=short,
                name=f"{full}.{ffn.up.path}",
                key=ffn.up.path,
                roles=roles,
                num_units=neurons,
                num_groups=neurons,
                sizes={"intermediate_size": neurons},
                spec=ffn,
                activation=at_path(layer, ffn.activation),
            )


# --------------------------------------------------------------------------------------------------------------- hidden states


def hidden_size_name(config: Any) -> str:
    """What a family's config calls the hidden size."""
    return str(config.attribute_map.get("hidden_size", "hidden_size"))


#: What layers call the hidden states that go into them, where they are named.
HIDDEN = "hidden_states"


def hidden_into(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states in what a layer is called with."""
    hidden: Tensor = args[0] if args else kwargs[HIDDEN]
    return hidden


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden
