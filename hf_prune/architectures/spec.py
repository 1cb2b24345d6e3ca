"""The vocabulary in which a model family is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One projection: a module path relative to the layer, and which of `parts` equal shares of its outputs is meant.

    `Part("attn.c_attn", 1, 3)` is the key in GPT-2's packed query-key-value projection.
    """

    path: str
    index: int = 0
    parts: int = 1


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block of a layer.

    Attributes:
        module: path, relative to the layer, of the module whose `forward` computes attention.
        query, key, value, output: its projections, paths relative to the layer.
        heads: name of the attribute of `module` that holds the number of heads.
        sizes: attributes of `module` that must follow the number of heads: `"heads"` for the number itself, `"width"` for
            heads times head size.
    """

    module: str
    query: Part
    key: Part
    value: Part
    output: Part
    heads: str = "num_attention_heads"
    sizes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FeedForwardSpec:
    """A feed-forward block of a layer: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    Attributes:
        up, down, gate: its projections, paths relative to the layer.
        activation: path, relative to the layer, of the activation function.
    """

    up: Part
    down: Part
    activation: str
    gate: Part | None = None


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model family.

    Attributes:
        model_types: the `config.model_type` values it serves.
        layers: the module lists that hold the layers, relative to the base model (`"encoder.layer"`).
        attentions, feed_forwards: the blocks of a layer. One that a given layer does not have (cross-attention in an encoder) is
            passed over.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    attentions: tuple[AttentionSpec, ...]
    feed_forwards: tuple[FeedForwardSpec, ...]
