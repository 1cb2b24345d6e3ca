"""Decoders: models that go on with a text."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part
from .encoder_decoders import BART
from .fragments import HEADS, NEURONS


def _gpt2_attention(name: str, query: Part, packed: int) -> AttentionSpec:
    """`packed`: how many parts `c_attn` has; key and value are the last two."""
    return AttentionSpec(
        module=name,
        query=query,
        key=Part(f"{name}.c_attn", packed - 2, packed),
        value=Part(f"{name}.c_attn", packed - 1, packed),
        output=Part(f"{name}.c_proj"),
        sizes={"num_heads": "heads", "split_size": "width"},
        after=("resid_dropout",),
    )


GPT2 = ArchitectureSpec(
    model_types=("gpt2",),
    layers=("h",),
    attentions=(
        _gpt2_attention("attn", Part("attn.c_attn", 0, 3), packed=3),
        _gpt2_attention("crossattention", Part("crossattention.q_attn"), packed=2),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.c_fc"), down=Part("mlp.c_proj"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    depths_when={"scale_attn_by_inverse_layer_idx": False},
    widths=({"intermediate_size": "n_inner"},),
)

OPT = replace(
    BART,
    model_types=("opt",),
    layers=("decoder.layers",),
    depths=("num_hidden_layers",),
    depths_when={"do_layer_norm_before": True},
    widths=({"intermediate_size": "ffn_dim"},),
)

LLAMA = ArchitectureSpec(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    layers=("layers",),
    attentions=(
        AttentionSpec(
            module="self_attn",
            query=Part("self_attn.q_proj"),
            key=Part("self_attn.k_proj"),
            value=Part("self_attn.v_proj"),
            output=Part("self_attn.o_proj"),
            sizes={"num_key_value_groups": "groups"},
        ),
    ),
    feed_forwards=(
        FeedForwardSpec(gate=Part("mlp.gate_proj"), up=Part("mlp.up_proj"), down=Part("mlp.down_proj"), activation="mlp.act_fn"),
    ),
    depths=("num_hidden_layers",),
    widths=(NEURONS | HEADS | {"num_key_value_heads": "num_key_value_heads"},),
)
