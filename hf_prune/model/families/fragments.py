"""Parts that the specs of several families share."""

from __future__ import annotations

from typing import Any

from ..spec import AttentionSpec, FeedForwardSpec, Part

#: The name of the number of neurons in the config of most families.
NEURONS = {"intermediate_size": "intermediate_size"}
#: The same, for families whose config has a separate head width.
HEADS = {"num_attention_heads": "num_attention_heads", "head_dim": "head_dim"}
#: The config attribute from which, with the hidden size, the width of a head follows in most families without a separate one.
OWN_HEADS = ("num_attention_heads",)


def attention(module: str, names: str, **settings: Any) -> AttentionSpec:
    """Attention with projections of these `names` in `module`: query, key, value and, unless another module has it, output."""
    parts = {role: Part(f"{module}.{name}") for role, name in zip(("query", "key", "value", "output"), names.split())}
    return AttentionSpec(module=module, **parts | settings)


def packed(path: str, count: int, interleaved: bool = False) -> tuple[Part, ...]:
    """The parts of a packed projection, one after the other, or side by side for every head or group of heads."""
    return tuple(Part(path, index, count, interleaved) for index in range(count))


def packed_attention(module: str, names: str, interleaved: bool = False, **settings: Any) -> AttentionSpec:
    """Attention with a packed query-key-value projection, then an output, of these `names` in `module`."""
    inputs, output = (f"{module}.{name}" for name in names.split())
    query, key, value = packed(inputs, 3, interleaved)
    return AttentionSpec(module, query, key, value, Part(output), **settings)


def feed_forward(names: str, activation: str) -> FeedForwardSpec:
    """A plain feed-forward block with projections of these names, up and down."""
    up, down = map(Part, names.split())
    return FeedForwardSpec(up=up, down=down, activation=activation)


def bert_like(module: str, names: str, **settings: Any) -> AttentionSpec:
    """Attention whose module stores its sizes like BERT's."""
    sizes = {"num_attention_heads": "heads", "all_head_size": "width"}
    return attention(module, names, head_size="attention_head_size", sizes=sizes, **settings)


def bart_like(module: str, **settings: Any) -> AttentionSpec:
    """BART's attention."""
    return attention(module, "q_proj k_proj v_proj out_proj", sizes={"num_heads": "heads"}, **settings)


#: Llama's feed-forward block.
GATED = FeedForwardSpec(gate=Part("mlp.gate_proj"), up=Part("mlp.up_proj"), down=Part("mlp.down_proj"), activation="mlp.act_fn")

BERT_FFN = FeedForwardSpec(up=Part("intermediate.dense"), down=Part("output.dense"), activation="intermediate.intermediate_act_fn")
