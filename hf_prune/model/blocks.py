"""Specs resolved against a real model: the attention and feed-forward blocks with their modules and sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .families import spec_for
from .spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part
from .wrappers import transformers_models


def active_copy(module: Any) -> Any:
    """What computes in the place of a module that PEFT's `modules_to_save` names: its active copy. Any other module as it is."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return module
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active else module.original_module


class Adapted:
    """Base of what is mixed into stock classes to give their modules another `forward`; see [`adapted`]."""

    stock_class: type[Any]
    mixins: tuple[type[Any], ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled as what the class was made of, because no module has it under its name."""
        stock: Any = super()
        _, _, *state = stock.__reduce_ex__(max(protocol, 2))
        return _new, (self.stock_class, self.mixins), *state


@functools.cache
def adapted(stock: Any, mixins: tuple[type[Any], ...]) -> type[Any]:
    """A subclass of a stock class, by its name, with [`Adapted`] mixins in front."""
    return type(stock.__name__, (*mixins, stock), {"__module__": stock.__module__, "stock_class": stock, "mixins": mixins})


def _new(stock: Any, mixins: tuple[type[Any], ...]) -> Any:
    cls: Any = adapted(stock, mixins)
    return cls.__new__(cls)


def is_adapted(module: Any) -> bool:
    """Whether a module is a layer of PEFT around a layer of the model."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def base_layer(module: Any) -> Any:
    """The layer of the model under its adapters, if it has any."""
    while is_adapted(module):
        module = module.base_layer
    return module


def computed(module: nn.Module) -> str:
    """Which of a layer's weight and bias is no parameter but computed from others, in words; `""` if neither is.

    So do `torch.nn.utils.parametrize`, `torch.nn.utils.prune` and weight norm, of which wav2vec2 makes use. Zeros that are written
    into such a tensor are gone with the next forward.
    """
    layer = base_layer(module)
    for name in ("weight", "bias"):
        if name not in layer._parameters and getattr(layer, name, None) is not None:
            sources = [key for key, _ in layer.named_parameters() if any(step.startswith(name) for step in key.split("."))]
            return f"its {name} is no parameter but computed from {', '.join(sources)}"
    return ""


def out_features(module: nn.Module) -> int:
    """Number of outputs of a Linear or of GPT-2's Conv1D (whose weight is stored `[in, out]`)."""
    layer = base_layer(module)
    size: int = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
    return size


@dataclass(frozen=True)
class Projection:
    """A projection of a block: the module, its name in the model, and the range of output rows that belongs to it.

    Under PEFT the module is the layer with its adapters, and the name is the one without them.
    """

    name: str
    module: nn.Module
    start: int
    stop: int


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block. `layer` is the layer's name without the task head's prefix; `name` is the block's name in the model."""

    layer: str
    name: str
    spec: AttentionSpec
    module: nn.Module
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    head_size: int
    extra: tuple[Projection, ...] = ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections of the block that every family has."""
        return self.query, self.key, self.value, self.output

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return (self.query.stop - self.query.start) // self.head_size

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads; fewer than query heads under grouped-query attention."""
        return (self.value.stop - self.value.start) // self.head_size

    @property
    def heads_per_group(self) -> int:
        """How many query heads share a key and value head (1 when no head is left)."""
        return self.num_heads // self.num_key_value_heads if self.num_heads else 1


@dataclass(frozen=True)
class FeedForwardBlock:
    """One feed-forward block; see [`AttentionBlock`]."""

    layer: str
    name: str
    spec: FeedForwardSpec
    up: Projection
    down: Projection
    gate: Projection | None
    activation: Any

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Every projection of the block."""
        return tuple(projection for projection in (self.up, self.gate, self.down) if projection is not None)

    @property
    def num_neurons(self) -> int:
        """Width of the intermediate layer."""
        return self.up.stop - self.up.start


Block = AttentionBlock | FeedForwardBlock


def computed_part(parts: Iterable[Projection]) -> str:
    """Which projection of a block has a weight or bias that is [`computed`], in words; `""` if none has."""
    found = ((part.name, computed(part.module)) for part in parts)
    return next((f"of {name}: {reason}" for name, reason in found if reason), "")


def _get(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for step in path.split("."):
        root = active_copy(getattr(root, step, None))
    return root


def _projection(layer: nn.Module, layer_name: str, part: Part) -> Projection:
    module = _get(layer, part.path)
    if module is None:
        raise ValueError(f"{layer_name} has no {part.path}, which the architecture spec of its family names.")
    size = out_features(module) // part.parts
    return Projection(f"{layer_name}.{part.path}", module, part.index * size, (part.index + 1) * size)


def layer_lists(base: nn.Module, path: str) -> dict[str, Any]:
    """The module lists of a base model that a path of `ArchitectureSpec.layers` names, by their names; empty if it has none."""
    found = {"": base}
    for step in path.split("."):
        found = {
            f"{name}.{key}" if name else key: child
            for name, module in found.items()
            for key, child in module.named_children()
            if step in ("*", key)
        }
    return found


def blocks(model: nn.Module, spec: ArchitectureSpec, prefix: str = "") -> Iterator[Block]:
    """Yield every block of a transformers model that `spec` describes, layer by layer; adapters in it are seen through.

    Args:
        model: the model.
        spec: its family's.
        prefix: what the blocks' names begin with, for a model inside another.

    Raises:
        ValueError: a block lacks a projection.
    """
    base: Any = getattr(model, "base_model", model)
    prefix += next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    for path in spec.layers:
        for short, layer in (
            (f"{list_name}.{index}", layer)
            for list_name, layers in layer_lists(base, path).items()
            for index, layer in enumerate(layers)
        ):
            full = prefix + short
            for attention in spec.attentions:
                if (module := _get(layer, attention.module)) is not None:
                    query, key, value, output = (
                        _projection(layer, full, part)
                        for part in (attention.query, attention.key, attention.value, attention.output)
                    )
                    head_size = getattr(module, attention.head_size)
                    name = f"{full}.{attention.module}"
                    there = [part for part in attention.extra if _get(layer, part.path) is not None]
                    extra = tuple(_projection(layer, full, part) for part in there)
                    yield AttentionBlock(short, name, attention, module, query, key, value, output, head_size, extra)
            for ffn in spec.feed_forwards:
                if _get(layer, ffn.up.path) is not None:
                    yield FeedForwardBlock(
                        layer=short,
                        name=f"{full}.{ffn.up.path}",
                        spec=ffn,
                        up=_projection(layer, full, ffn.up),
                        down=_projection(layer, full, ffn.down),
                        gate=_projection(layer, full, ffn.gate) if ffn.gate else None,
                        activation=_get(layer, ffn.activation),
                    )


def find_blocks(model: Any) -> list[Block]:
    """The blocks of the transformers models in a model (of one, if it is one), by their `config.model_type`.

    Raises:
        ValueError: a family has no spec, or a model is not what its spec describes.
    """
    found: list[Block] = []
    for name, one in (transformers_models(model) or {"": model}).items():
        model_type = getattr(getattr(one, "config", None), "model_type", None)
        found += blocks(one, spec_for(str(model_type)), f"{name}." if name else "")
    return found
