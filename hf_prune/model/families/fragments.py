"""What records of several families share."""

from __future__ import annotations

from ..spec import AttentionSpec, FeedForwardSpec, Part

#: How the config of most families calls the number of neurons.
NEURONS = {"intermediate_size": "intermediate_size"}
#: The same, and heads whose width is set apart from their number.
HEADS = {"num_attention_heads": "num_attention_heads", "head_dim": "head_dim"}

BERT_SIZES = {"num_attention_heads": "heads", "all_head_size": "width"}
BERT_FFN = FeedForwardSpec(up=Part("intermediate.dense"), down=Part("output.dense"), activation="intermediate.intermediate_act_fn")


def bart_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=name,
        query=Part(f"{name}.q_proj"),
        key=Part(f"{name}.k_proj"),
        value=Part(f"{name}.v_proj"),
        output=Part(f"{name}.out_proj"),
        sizes={"num_heads": "heads"},
    )
