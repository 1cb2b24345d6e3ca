"""The data classes that describe a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """One projection: a module path relative to the layer, and the index of the part if its outputs pack several `parts`.

    `Part("attn.c_attn", 1, 3)` is the key in GPT-2's packed query-key-value projection: first all queries, then all keys, then all
    values. If the parts are `interleaved`, as in GPT-NeoX, the query, key and value of each head are side by side. Parts are
    equal, except that where several query heads share a key and value head the queries have as many times the rows of the keys:
    those of all heads (Phi-3), or, interleaved, those of the heads of each key and value head (Falcon).
    """

    path: str
    index: int = 0
    parts: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class ByHead:
    """A parameter of an attention block, beside its projections, that has entries for every head.

    Attributes:
        path: its path relative to the layer.
        dim: the dimension along heads; each head has one entry or several neighbouring ones.
        role: whose heads, `"query"` or `"key"`.
        forward: `"StockMean"` if it scales an RMSNorm over all heads at once (OLMo 2), whose mean is over the heads of the stock
            model for ever. Such a norm sees the queries of a dead head, which therefore have to be zero for the head to go.
    """

    path: str
    dim: int = 0
    role: str = "query"
    forward: str = ""


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block of a layer.

    Attributes:
        module: path, relative to the layer, of the module whose `forward` computes attention.
        query, key, value, output: its projections, paths relative to the layer.
        head_size: name of the attribute of `module` that holds the width of one head.
        sizes: attributes of `module` that depend on the number of heads: `"heads"` for the number itself, `"width"` for heads times
            head size, `"key_value_heads"` for the number of key and value heads, `"groups"` for how many query heads share one. A
            projection that packs queries with fewer keys needs one of the last two. `"config.num_heads"` is what `module` reads
            from its config in `forward`, and then needs `OwnConfig` among `forwards`.
        after: submodules of `module` that it applies to the result of its output projection, in this order.
        residual_norm: LayerNorm of `module` that it finally applies to that plus its own input, `""` for none.
        extra: optional further projections of `module` with rows for every head (DeBERTa's positions).
        by_head: parameters with entries for every head, those of them that the model has.
        scale: the parameter, a path relative to the layer, that the result is multiplied with, channel by channel, before it is
            added to the stream (layer scale); `""` for none. A model may lack it.
        norm: the norm of the layer that the result goes through before it is added to the stream; `""` for none.
        position_bias: whether `forward` receives a bias with an entry for every head of the stock model: `"taken"`, `"passed on"`
            (also returned as the second output, for the next layer), or `""`.
        position_arguments: what `forward` calls these biases, where its family needs `OwnBiases` among `forwards`: their names, and
            for each the dimension along heads, 0 if it is along batch and heads together.
        adds_residual: `forward` receives the stream as its second argument, and adds it to the result.
        returns_tensor: `forward` returns its result alone, and not also attention weights.
        position_table: the embedding of `module` that this bias comes from, with a column for every head; `""` for one elsewhere.
        forwards: the classes of `condense/forwards.py` that change what the `forward` of `module` does when heads are gone.
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
    position_table: str = ""
    forwards: tuple[str, ...] = ()
    by_head: tuple[ByHead, ...] = ()
    scale: str = ""
    norm: str = ""
    position_arguments: Mapping[str, int] = field(default_factory=dict)
    adds_residual: bool = False
    returns_tensor: bool = False
    optional: bool = False


@dataclass(frozen=True)
class FeedForwardSpec:
    """A feed-forward block of a layer: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

    Attributes:
        up, down, gate: its projections, paths relative to the layer.
        activation: path, relative to the layer, of the activation function.
        scale, norm: as those of an attention block.
        optional: some models of the family have no such block (but another one that the spec lists).
    """

    up: Part
    down: Part
    activation: str
    gate: Part | None = None
    scale: str = ""
    norm: str = ""
    optional: bool = False


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model family.

    Attributes:
        model_types: the values of `config.model_type` of the family.
        layers: the module lists that hold the layers, relative to the base model (`"encoder.layer"`); a `*` stands for every
            member of a list of lists.
        attentions, feed_forwards: the blocks of a layer. Each is in some layer, though not necessarily in all, unless it is
            `optional`.
        depths: the config attributes with the number of layers in each of `layers`. Default: layers are shared, and all stay.
        pre_norm: whether the layers only add to their input, feed-forward last, so that removing one that has no blocks left
            changes nothing.
        pre_norm_when: values that config attributes, if they exist, must have for `pre_norm` to apply.
        widths: for each of `layers`, name of a size in `config.hf_prune` → the config attribute that holds it for all blocks alike;
            `head_dim` beside `num_attention_heads` if the width of a head is independent of their number. A model whose sizes these
            attributes can express is an ordinary one. Default: none.
            A dotted name is that of a config inside the config (`"vision_config.intermediate_size"`), here and elsewhere.
        heads: for each of `layers`, the config attribute that holds the number of heads, if the width of a head is the hidden size
            over that number. Default: the width is independent of the hidden size.
        as_hidden: config attributes that equal the hidden size in models that have no projection between the two.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    attentions: tuple[AttentionSpec, ...]
    feed_forwards: tuple[FeedForwardSpec, ...]
    depths: tuple[str, ...] = ()
    pre_norm: bool = False
    pre_norm_when: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[Mapping[str, str], ...] = ()
    heads: tuple[str, ...] = ()
    as_hidden: tuple[str, ...] = ()
