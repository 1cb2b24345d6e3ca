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


def packed(path: str, count: int) -> tuple[Part, ...]:
    """The equal parts of a packed projection, one after the other."""
    return tuple(Part(path, index, count) for index in range(count))


def bert_like(module: str, names: str, **settings: Any) -> AttentionSpec:
    """Attention whose module stores its sizes like BERT's."""
    sizes = {"num_attention_heads": "heads", "all_head_size": "width"}
    return attention(module, names, head_size="attention_head_size", sizes=sizes, **settings)


def bart_like(module: str, **settings: Any) -> AttentionSpec:
    """BART's attention."""
    return attention(module, "q_proj k_proj v_proj out_proj", sizes={"num_heads": "heads"}, **settings)


BERT_FFN = FeedForwardSpec(up=Part("intermediate.dense"), down=Part("output.dense"), activation="intermediate.intermediate_act_fn")
