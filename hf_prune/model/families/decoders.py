"""Decoders: causal language models."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part
from .encoder_decoders import BART
from .fragments import HEADS, NEURONS, OWN_HEADS, attention, packed


def _gpt2_attention(module: str, parts: tuple[Part, ...], optional: bool = False) -> AttentionSpec:
    query, key, value = parts
    return AttentionSpec(
        module=module,
        query=query,
        key=key,
        value=value,
        output=Part(f"{module}.c_proj"),
        sizes={"num_heads": "heads", "split_size": "width"},
        after=("resid_dropout",),
        optional=optional,
    )


GPT2 = ArchitectureSpec(
    model_types=("gpt2",),
    layers=("h",),
    attentions=(
        _gpt2_attention("attn", packed("attn.c_attn", 3)),
        _gpt2_attention("crossattention", (Part("crossattention.q_attn"), *packed("crossattention.c_attn", 2)), optional=True),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.c_fc"), down=Part("mlp.c_proj"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    pre_norm_when={"scale_attn_by_inverse_layer_idx": False},
    widths=({"intermediate_size": "n_inner"},),
    heads=("n_head",),
)

OPT = replace(
    BART,
    model_types=("opt",),
    layers=("decoder.layers",),
    attentions=BART.attentions[:1],
    depths=("num_hidden_layers",),
    pre_norm=True,
    pre_norm_when={"do_layer_norm_before": True},
    widths=({"intermediate_size": "ffn_dim"},),
    heads=OWN_HEADS,
    as_hidden=("word_embed_proj_dim",),
)

LLAMA = ArchitectureSpec(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    layers=("layers",),
    attentions=(attention("self_attn", "q_proj k_proj v_proj o_proj", sizes={"num_key_value_groups": "groups"}),),
    feed_forwards=(
        FeedForwardSpec(gate=Part("mlp.gate_proj"), up=Part("mlp.up_proj"), down=Part("mlp.down_proj"), activation="mlp.act_fn"),
    ),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS | HEADS | {"num_key_value_heads": "num_key_value_heads"},),
)
