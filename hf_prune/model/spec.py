"""The vocabulary in which a model family is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One projection: a module path relative to the layer, and which of `parts` equal shares of its outputs is meant.

    `Part("attn.c_attn", 1, 3)` is the key in GPT-2's packed query-key-value projection, where all queries come first, then all
    keys, then all values. Where the shares are `interleaved`, as in GPT-NeoX, each head has its query, key and value side by side.
    """

    path: str
    index: int = 0
    parts: int = 1
    interleaved: bool = False

    def rows(self, size: int, width: int) -> Tensor:
        """Which of a module's `size` outputs are the projection's when a unit has `width` of them, ascending, `[size / parts]`."""
        rows = torch.arange(size, device="cpu")
        if self.interleaved:
            return rows.view(size // (self.parts * width), self.parts, width)[:, self.index].flatten()
        return rows.view(self.parts, size // self.parts)[self.index]


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block of a layer.

    Attributes:
        module: path, relative to the layer, of the module whose `forward` computes attention.
        query, key, value, output: its projections, paths relative to the layer.
        head_size: name of the attribute of `module` that holds the width of one head.
        sizes: attributes of `module` that must follow the number of heads: `"heads"` for the number itself, `"width"` for
            heads times head size, `"groups"` for how many query heads share a key and value head.
        after: modules of `module` that it applies to what its output projection returns, in this order.
        residual_norm: LayerNorm of `module` that it applies in the end to that plus its own input, `""` for none.
        extra: other projections of `module` with rows for every head, where it has them (DeBERTa's of positions).
        position_bias: whether a bias for every head of the stock model is handed to `forward`: `"taken"`, `"passed on"` to the
            next layer by returning it as the second output, or `""`.
        optional: some models of the family have no such block (cross-attention).
    """

    module: str
    query: Part
    key: Part
    value: Part
    output: Part
    head_size: str = "head_dim"
    sizes: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    residual_norm: str = ""
    extra: tuple[Part, ...] = ()
    position_bias: str = ""
    optional: bool = False


@dataclass(frozen=True)
class FeedForwardSpec:
    """A feed-forward block of a layer: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    Attributes:
        up, down, gate: its projections, paths relative to the layer.
        activation: path, relative to the layer, of the activation function.
        optional: some models of the family have no such block (but another of those that the family lists).
    """

    up: Part
    down: Part
    activation: str
    gate: Part | None = None
    optional: bool = False


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model family.

    Attributes:
        model_types: the `config.model_type` values it serves.
        layers: the module lists that hold the layers, relative to the base model (`"encoder.layer"`); a `*` stands for every
            member of a list of lists.
        attentions, feed_forwards: the blocks of a layer. A layer need not have each of them, but some layer has, unless a block is
            `optional`.
        depths: for families whose layers only add to what they are given (pre-norm), feed-forward last: the config attributes that
            hold how many layers each of `layers` has. A layer without blocks can then go. Default: every layer stays.
        depths_when: values that config attributes, where they exist, must have for `depths` to hold.
        widths: for each of `layers`, the config attributes that hold the size of every block alike, by what `config.hf_prune` calls
            the size; `head_dim` beside `num_attention_heads` where the width of a head does not follow from their number. A model
            whose sizes they can say is an ordinary one. Default: the config has no say.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    attentions: tuple[AttentionSpec, ...]
    feed_forwards: tuple[FeedForwardSpec, ...]
    depths: tuple[str, ...] = ()
    depths_when: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[Mapping[str, str], ...] = ()
